"""Make a packaged model of a trained run: its weights as float16, and what it was trained on.

    python tools/package_model.py RUN NAME

Writes src/trilemma/trained/NAME.safetensors, which `trilemma sample NAME` then finds. The licence
of the pictures it was trained on belongs into src/trilemma/trained/LICENSE-NAME.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trilemma import checkpoint

MOST = 16 * 2**20  # bytes: what a clone and an installation carry without noticing


def main() -> None:
    """Write the packaged model of the run and under the name of the command line."""
    run, name = sys.argv[1:]
    tensors, facts = checkpoint.read_model(run)
    halves = {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}
    large = [key for key, t in halves.items() if t.is_floating_point() and not t.isfinite().all()]
    if large:
        sys.exit(f"too large for float16: {', '.join(large[:3])}")
    facts["recipe"]["run"]["data"] = Path(facts["recipe"]["run"]["data"]).name
    target = checkpoint.PACKAGED / f"{name}.safetensors"
    checkpoint.write(target, halves, {k: v for k, v in facts.items() if k != "format"})
    size = target.stat().st_size
    if size > MOST:
        target.unlink()
        sys.exit(f"{size / 2**20:.1f} MiB as float16; a packaged model has at most 16")
    print(f"{target.name}: {size / 2**20:.1f} MiB, recipe {facts['recipe']['run']['recipe']}")


if __name__ == "__main__":
    main()
