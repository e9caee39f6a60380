"""What a run tells while it trains: `log.jsonl`, TensorBoard events, a progress bar."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

TELL_EVERY = 10.0  # seconds between lines where there is no terminal
NOT_LOSSES = ("step", "seen", "elapsed", "images_per_second")


def clock(seconds: float) -> str:
    """Write seconds as `4:05` or `1:02:03`."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def count(number: float) -> str:
    """Write a count as `950`, `12.3k` or `4.56M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


class _Told(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["told"])


class Log:
    """Writes what happens in a run to its folder and to the screen.

    Args:
        folder: the run folder; None (another process than the first) writes nothing.
        name: what the progress bar is called.
        quiet: show nothing on the screen.
        resumed_at: drop lines of `log.jsonl` after this step: they are about to happen again.
    """

    def __init__(self, folder: Path | None, name: str, quiet: bool, resumed_at: int) -> None:
        self._file, self._events = None, None
        self._console = Console(stderr=True, quiet=quiet or folder is None)
        self._bar: Progress | None = None
        self._name, self._last_told = name, time.monotonic()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "log.jsonl"
            kept = [] if not path.exists() else path.read_text("utf-8").splitlines(keepends=True)
            kept = [line for line in kept if _step(line) <= resumed_at]
            path.write_text("".join(kept), "utf-8")
            self._file = path.open("a", encoding="utf-8")
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(folder), purge_step=resumed_at)
        if self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                _Told(),
                console=self._console,
            )
            self._task = self._bar.add_task(name, total=1.0, told="starting")
            self._bar.start()

    def write(self, line: dict[str, Any]) -> None:
        """Append one line to `log.jsonl`, numbers also to TensorBoard."""
        if self._file is None:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in {**line, **line.get("probe", {})}.items():
                if isinstance(value, int | float) and key != "step":
                    self._events.add_scalar(key, value, line["step"])

    def show(self, fraction: float, line: dict[str, Any], remaining: float) -> None:
        """Move the progress bar, or print a line now and then where there is no terminal."""
        losses = [
            f"{key} {value:.4g}"
            for key, value in line.items()
            if key not in NOT_LOSSES and isinstance(value, float)
        ]
        told = (
            f"{fraction:4.0%}  {count(line['seen'])} images  {line['images_per_second']:.0f}/s  "
            f"{clock(line['elapsed'])} + {clock(remaining)}  {'  '.join(losses[:4])}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=min(fraction, 1.0), told=told)
        elif time.monotonic() - self._last_told >= TELL_EVERY:
            self._last_told = time.monotonic()
            self.say(f"{self._name} {told}")

    def say(self, message: str) -> None:
        """Print a message for people, above the progress bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return math.inf
