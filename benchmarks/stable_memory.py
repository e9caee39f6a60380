"""Memory of loading a Stable Diffusion 1.5 U-Net, and of decoding a large picture.

Writes a checkpoint of random float32 weights, 3.4 GB, into a temporary folder (TMPDIR says where),
and loads it in a process of its own, as `trilemma sample` does; then runs it once on small latents,
so that every weight has been read. Peak resident memory is that of the whole process, less what
Python with our imports holds: shared with the system's file cache where weights are views of the
file. Loading takes turns with reading the file, twice, from the cache.

Decoding is of 128 x 128 latents, at once and in bands, each in a process of its own, in float32 or
as checkpoints are drawn from where bfloat16 pays; the largest difference of the two pictures is
told. The whole process is all that it holds: Python with our imports, weights of encoder and
decoder, maps.

    python benchmarks/stable_memory.py --only load
    python benchmarks/stable_memory.py --only decode
    python benchmarks/stable_memory.py --only decode --bfloat16
    python benchmarks/stable_memory.py --tiny       # does it run?
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from trilemma import device
from trilemma.networks.kl_autoencoder import KLAutoencoder
from trilemma.networks.layers import Embedded, GroupNorm
from trilemma.networks.spatial_unet import SpatialUNet
from trilemma.stable import files, load, packing

WHERE = torch.device("cpu")


def sizes(tiny: bool) -> dict[str, tuple[int, ...]]:
    return {"channels": (32, 64, 128, 128) if tiny else (320, 640, 1280, 1280)}


def write(path: Path, tiny: bool) -> int:
    """Write random weights tensor by tensor; return the file's size."""
    header, end = {}, 0
    with torch.device("meta"):
        state = SpatialUNet(**sizes(tiny)).state_dict()
    for name, tensor in state.items():
        size = 4 * tensor.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    draw = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for tensor in state.values():
            file.write((0.02 * draw.standard_normal(tensor.numel(), np.float32)).tobytes())
    return path.stat().st_size


def peak() -> int:
    """Return the most bytes that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(task: str, path: Path, tiny: bool, half: bool = False) -> dict[str, float]:
    """Do one task in a process of its own; return what it told."""
    command = [sys.executable, __file__, "--task", task, "--path", str(path)]
    command += ["--tiny"] * tiny + ["--bfloat16"] * half
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(task: str, path: Path, tiny: bool, half: bool) -> dict[str, float]:
    before, start = peak(), time.perf_counter()
    if task == "read":
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
        return {"seconds": time.perf_counter() - start}
    with torch.inference_mode():
        if task in ("whole", "bands"):
            torch.manual_seed(0)
            kind = torch.bfloat16 if half else torch.float32
            coder = KLAutoencoder().eval().to(kind)
            for part in coder.modules():
                if isinstance(part, GroupNorm):
                    part.float()
            device.prepare(coder, WHERE, kind)
            side = 16 if tiny else 128
            latent = torch.randn(1, 4, side, side)
            before, start = peak(), time.perf_counter()
            with device.autocast(kind, WHERE):
                drawn = coder.decode(latent, task == "bands")
            seconds, most = time.perf_counter() - start, peak()
            np.save(path.with_name(f"{task}.npy"), drawn.numpy())
            return {"peak": most - before, "all": most, "seconds": seconds}
        kind = torch.float32 if task == "float32" else torch.bfloat16
        unet = load.unet(sizes(tiny), files.read(path)[0], "unet", WHERE, kind)
        if packing.pays(WHERE, kind):
            packing.pack(unet)
        seconds, loaded = time.perf_counter() - start, peak() - before
        with device.autocast(kind, WHERE):
            unet(
                torch.randn(2, 4, 8, 8),
                torch.full((2,), 0.5),
                Embedded(tokens=torch.randn(2, 77, 768)),
            )
        return {"seconds": seconds, "loaded": loaded, "peak": peak() - before}


def loaded(path: Path, tiny: bool, half: bool) -> None:
    size = write(path, tiny)
    print(f"\n{size / 1e9:.2f} GB of float32 weights\n")
    print("| loaded as | s | s to read the file | peak when loaded / file | after use / file |")
    print("|---|---|---|---|---|")
    missed = []
    for kind in ("float32", "bfloat16"):
        reads, loads = zip(
            *[(child("read", path, tiny), child(kind, path, tiny)) for _ in range(2)], strict=True
        )
        best = min(loads, key=lambda each: each["seconds"])
        read = min(each["seconds"] for each in reads)
        print(
            f"| {kind} | {best['seconds']:.2f} | {read:.2f} | {best['loaded'] / size:.2f} | "
            f"{best['peak'] / size:.2f} |"
        )
        if kind == "float32":
            missed = [best["peak"] > 1.1 * size, best["seconds"] > 1.3 * read]
    said = ["NO" if each else "yes" for each in missed]
    print(f"\nfloat32, target at most 1.1 times its size: {said[0]}")
    print(f"float32, target at most 1.3 times the time of reading: {said[1]}")


def decoded(path: Path, tiny: bool, half: bool) -> None:
    size = "128x128" if tiny else "1024x1024"
    told = f"decoding {size}, {'bfloat16' if half else 'float32'}"
    print(f"\n| {told} | peak less weights, GB | whole process, GB | s |")
    print("|---|---|---|---|")
    for task in ("whole", "bands"):
        found = child(task, path, tiny, half)
        held = f"{found['peak'] / 1e9:.2f} | {found['all'] / 1e9:.2f}"
        print(f"| {task} | {held} | {found['seconds']:.0f} |")
    whole, bands = (np.load(path.with_name(f"{task}.npy")) for task in ("whole", "bands"))
    far = np.abs(whole - bands).max() / (whole.max() - whole.min())
    print(f"\nlargest difference {far:.1e} of the picture's range")
    print(f"target under 3 GB in bands: {'yes' if found['all'] < 3e9 else 'NO'}")


PARTS = {"load": loaded, "decode": decoded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one part; both if not said")
    parser.add_argument("--tiny", action="store_true", help="a network of a tenth of the widths")
    parser.add_argument("--bfloat16", action="store_true", help="decode in bfloat16")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, default=Path("-"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(work(args.task, args.path, args.tiny, args.bfloat16)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            if args.only in (None, name):
                part(Path(folder) / "diffusion_pytorch_model.safetensors", args.tiny, args.bfloat16)


if __name__ == "__main__":
    main()
