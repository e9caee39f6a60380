"""Put a run's model into the package, so that `trilemma sample NAME` draws right after installing.

    python tools/pack_model.py RUN NAME

Its weights are stored in half precision, and loaded into single again; the recipe, the facts of the
data and the progress are kept as they are.
"""

from __future__ import annotations

import sys

from trilemma import checkpoint

LARGEST = 16e6  # bytes

run, name = sys.argv[1:]
tensors, facts = checkpoint.read_model(run)
for key, tensor in tensors.items():
    if tensor.is_floating_point():
        half = tensor.half()
        assert half.isfinite().all(), f"{key} is too large for half precision"
        tensors[key] = half
target = checkpoint.PACKAGED / f"{name}.safetensors"
checkpoint.write(target, tensors, facts)
size = target.stat().st_size
if size > LARGEST:
    target.unlink()
    sys.exit(f"{name} takes {size / 1e6:.1f} MB; expected {LARGEST / 1e6:.0f} at most")
print(f"{target}: {size / 1e6:.1f} MB")
