"""Two ways in which adversarial training fails without its loss telling, watched for.

Saturation: a critic that tells real from drawn pictures nearly always gives the other player little
to go by. Collapse: a generator draws ever fewer kinds of pictures. The first shows in the logged
share of pictures that the critic judges correctly; the second in the coverage (Naeem et al. 2020,
see metrics/prdc.py) of a few hundred training pictures by as many drawn ones, on pixels, which is
cheap and sees a collapse, though not how good pictures are.

No family is named: a run is watched when one of its losses logs a key of `WATCHED`. What has been
heard is read back from the run's `log.jsonl`, so that a resumed run goes on watching where it was.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import torch

from trilemma import device
from trilemma.batch import Rng, to_uint8
from trilemma.data import Dataset
from trilemma.metrics.features import extractor
from trilemma.metrics.prdc import density_coverage
from trilemma.metrics.reference import thinned
from trilemma.sampling import Trained

WATCHED = ("correct", "ahead")
"""What critics log: the share they judge correctly; or, where only differences of scores mean
something, the share of real pictures scored above drawn ones, which may be high without harm."""

CERTAIN, WINDOW = 0.98, 10  # a critic above the first in so many log lines in a row saturates
FALLEN, LEAST = 0.6, 0.1  # coverage below the first share of its best, if that is above the second
PICTURES, BATCH = 256, 64


class Alarm:
    """Hears what a run logs and says when something is wrong.

    Args:
        path: of the run's `log.jsonl`; what it holds has been heard already.
    """

    def __init__(self, path: Path) -> None:
        self.adversarial = False
        self._correct: dict[str, deque[float]] = {}
        self._saturated: set[str] = set()
        self._best, self._collapsed = 0.0, False
        for text in path.read_text("utf-8").splitlines():
            self.hear(json.loads(text))

    def hear(self, line: dict[str, Any]) -> list[str]:
        """Take in one line of the log; return the warnings that are due, each only once."""
        said = []
        for key, value in line.items():
            phase, _, name = key.rpartition("/")
            self.adversarial |= name in WATCHED
            if name == "correct" and self._saturates(phase, value):
                place = f"phases.{phase}" if phase else "optimizer"
                said.append(
                    f"warning: at step {line['step']} the critic has told real from drawn pictures "
                    f"correctly above {CERTAIN:.0%} for {WINDOW} log lines in a row: the generator "
                    f"can learn little from it. Give it a smaller rate (--set train.{place}.lr=...)"
                    f", a penalty (--set model.penalty=r1) or augmentation (--set model.augment=on)"
                )
        if "watch" in line and self._collapses(line["watch"]["coverage"]):
            said.append(
                f"warning: at step {line['step']} drawn pictures cover "
                f"{line['watch']['coverage']:.0%} of the training pictures, down from "
                f"{self._best:.0%}: the generator is collapsing onto fewer kinds. Stop here, or "
                f"start anew with a smaller rate (--set train.optimizer.lr=...), a larger batch, "
                f"or a steadier game, as the recipes quick-gan and wgan-gp have"
            )
        return said

    def _saturates(self, phase: str, correct: float) -> bool:
        heard = self._correct.setdefault(phase, deque(maxlen=WINDOW))
        heard.append(correct)
        if phase in self._saturated or len(heard) < WINDOW or min(heard) <= CERTAIN:
            return False
        self._saturated.add(phase)
        return True

    def _collapses(self, coverage: float) -> bool:
        self._best = max(self._best, coverage)
        fallen = self._best >= LEAST and coverage < FALLEN * self._best
        new, self._collapsed = fallen and not self._collapsed, fallen
        return new


def coverage(trained: Trained, data: Dataset) -> float:
    """Return the coverage of a few training pictures by pictures drawn under their conditions.

    Draws from the streams of seeds 0, 1, ...; torch's own generator stays where it is.
    """
    rows = thinned(len(data), PICTURES)
    where = next(trained.model.parameters()).device
    dtype = device.dtype(trained.recipe["train"].get("precision", "auto"), where)
    options = trained.options({})
    drawn = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        rng = Rng(range(start, start + len(part)), where)
        with torch.inference_mode(), device.autocast(dtype, where):
            condition = data.condition(part).to(where)
            drawn.append(to_uint8(trained.generator.sample(condition, rng, **options)).cpu())
    see = extractor("pixels")
    real = see(data.tensor(rows)).pooled
    k = min(5, len(rows) - 1)
    return density_coverage(real, see(torch.cat(drawn)).pooled, k=k)[1]
