"""The command line: one thin command for each thing the package does.

Nothing heavy is imported until a command needs it, so that `--help` is immediate. Results for
machines go to stdout (`--json`), everything for people to stderr. Exit codes: 0 success, 1 failure,
2 wrong use.
"""

from __future__ import annotations

import sys
import warnings

from trilemma.cli.shared import app, duration, number, screen
from trilemma.errors import Interrupted, UserError

# isort: off
# These say what commands are, in the order of the help.
from trilemma.cli import training, drawing, looking, pictures, edit, redraw, checkpoints  # noqa: F401

# isort: on

__all__ = ["app", "duration", "main", "number"]


def main() -> None:
    """Run the command line; one clear message for each failure, a traceback with `--debug`."""
    debug = "--debug" in sys.argv
    warnings.showwarning = _warn
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except (Interrupted, UserError, OSError, ValueError) as error:
        if debug:
            raise
        screen.print("error:", style="bold red", end=" ")
        screen.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Tell a warning without the line of code it comes from."""
    screen.print(f"warning: {message}", markup=False, soft_wrap=True)
