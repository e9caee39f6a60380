"""Four ways in which adversarial training fails without its loss telling, watched for.

Saturation: a critic that tells real from drawn pictures nearly always gives the other player little
to go by. A runaway: where only differences of scores mean something, being always ahead is no harm,
but a lead that multiplies is: the critic's slopes grow faster than the generator can follow. Both
show in what critics log. Collapse: a generator draws ever fewer kinds of pictures. Barrenness: it
never draws anything like the data. Both show in the coverage (Naeem et al. 2020, see
metrics/prdc.py) of a few hundred training pictures by as many drawn ones, on pixels, which is cheap
and sees a collapse, though not how good pictures are.

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
something, the share of real pictures scored above drawn ones, which may be high without harm, and
the mean scores of both as `real` and `fake`."""

CERTAIN, WINDOW = 0.98, 10  # a critic above the first in so many log lines in a row saturates
RUNAWAY = 4.0  # or runs away, when its lead in the second half of them is so many times the first's
FALLEN, LEAST = 0.6, 0.1  # coverage below the first share of its best, if that is above the second
BARREN = 10  # looks at coverage, none above LEAST or rising, after which nothing has begun
PICTURES, BATCH = 256, 64


class Alarm:
    """Hears what a run logs and says when something is wrong.

    Args:
        path: of the run's `log.jsonl`; what it holds has been heard already.
    """

    def __init__(self, path: Path) -> None:
        self.adversarial = False
        self._sure: dict[str, deque[float]] = {}  # the share judged correctly, by the key logged
        self._lead: dict[str, deque[float]] = {}  # real scores above drawn ones, by the same
        self._told: set[str] = set()
        self._covered: deque[float] = deque(maxlen=BARREN)
        self._best, self._collapsed = 0.0, False
        for text in path.read_text("utf-8").splitlines():
            self.hear(json.loads(text))

    def hear(self, line: dict[str, Any]) -> list[str]:
        """Take in one line of the log; return the warnings that are due, each only once."""
        said = []
        for key, value in line.items():
            phase, _, name = key.rpartition("/")
            if name not in WATCHED:
                continue
            self.adversarial = True
            place = f"phases.{phase}" if phase else "optimizer"
            if name == "correct" and self._saturates(key, value):
                said.append(
                    f"warning: at step {line['step']} the critic has told real from drawn pictures "
                    f"correctly above {CERTAIN:.0%} for {WINDOW} log lines in a row: the generator "
                    f"can learn little from it. Give it a smaller rate (--set train.{place}.lr=...)"
                    f", a penalty (--set model.penalty=r1) or augmentation (--set model.augment=on)"
                )
            where = key.removesuffix(name)
            if name == "ahead" and self._runs_away(
                key, value, line[f"{where}real"] - line[f"{where}fake"]
            ):
                said.append(
                    f"warning: at step {line['step']} the critic scores every real picture above "
                    f"the drawn ones, by {self._lead[key][-1]:.3g} on average, and "
                    f"{WINDOW - 1} log lines ago it was {self._lead[key][0]:.3g}: it runs away and "
                    f"the generator cannot follow. Start anew with a smaller rate for it "
                    f"(--set train.{place}.lr=...) or a heavier penalty (--set model.weight=...)"
                )
        if "watch" in line:
            said += self._look(line["step"], line["watch"]["coverage"])
        return said

    def _saturates(self, key: str, correct: float) -> bool:
        heard = self._sure.setdefault(key, deque(maxlen=WINDOW))
        heard.append(correct)
        return len(heard) == WINDOW and min(heard) > CERTAIN and self._new(key)

    def _runs_away(self, key: str, ahead: float, lead: float) -> bool:
        heard = self._lead.setdefault(key, deque(maxlen=WINDOW))
        heard.append(lead)
        half = WINDOW // 2
        before, after = (sum(part) for part in (list(heard)[:half], list(heard)[half:]))
        sure = self._sure.setdefault(key, deque(maxlen=WINDOW))
        sure.append(ahead)
        grows = len(heard) == WINDOW and after > RUNAWAY * before
        return grows and min(sure) > CERTAIN and self._new(key)

    def _look(self, step: int, coverage: float) -> list[str]:
        self._covered.append(coverage)
        self._best = max(self._best, coverage)
        fallen = self._best >= LEAST and coverage < FALLEN * self._best
        new, self._collapsed = fallen and not self._collapsed, fallen
        if new:
            return [
                f"warning: at step {step} drawn pictures cover {coverage:.0%} of the training "
                f"pictures, down from {self._best:.0%}: the generator is collapsing onto fewer "
                f"kinds. Stop here, or start anew with a smaller rate "
                f"(--set train.optimizer.lr=...), a larger batch, or a steadier game, as the "
                f"recipes quick-gan and wgan-gp have"
            ]
        rises = len(self._covered) < BARREN or coverage > self._covered[0]
        if self._best < LEAST and not rises and self._new("barren"):
            return [
                f"warning: at step {step} drawn pictures still cover {coverage:.0%} of the "
                f"training pictures: the generator has not begun to draw anything like them. Look "
                f"at the run's samples; give it more time, or start anew with a smaller rate for "
                f"the critic (--set train.phases.critic.lr=...) or with the recipe quick-gan"
            ]
        return []

    def _new(self, warning: str) -> bool:
        """Say whether a warning has not been given yet, and take note of it."""
        new = warning not in self._told
        self._told.add(warning)
        return new


def coverage(trained: Trained, data: Dataset) -> float:
    """Return the coverage of a few training pictures by pictures drawn under their conditions.

    Draws from the streams of seeds 0, 1, ...; torch's own generator stays where it is.
    """
    rows = thinned(len(data), PICTURES)
    where = trained.where
    options = trained.options({})
    drawn = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        rng = Rng(range(start, start + len(part)), where)
        with torch.inference_mode(), device.autocast(trained.dtype, where):
            condition = data.condition(part).to(where)
            drawn.append(to_uint8(trained.generator.sample(condition, rng, **options)).cpu())
    see = extractor("pixels")
    real = see(data.tensor(rows)).pooled
    k = min(5, len(rows) - 1)
    return density_coverage(real, see(torch.cat(drawn)).pooled, k=k)[1]
