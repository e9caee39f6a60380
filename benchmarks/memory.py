"""Peak memory of training each packaged recipe.

Each recipe is trained for a few steps by the command line, at its own batch, in a process of its
own; the table shows the most memory that the process ever held, everything included (Python and
torch alone take about 300 MiB). Pictures are 3x32x32 of ten classes, but as large as a recipe's
header trains them where it enlarges or translates. Float32: where bfloat16 pays, activations take
half. Sample grids and scores are left out, and ProGAN begins at its full size.

    python benchmarks/memory.py                 # all
    python benchmarks/memory.py vae gan         # some
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from trilemma import recipe

SIZES = {"cyclegan": 64, "srresnet": 96, "srgan": 96}  # others: 32
CHANGES = {"progan": ["model.stage_images=0", "model.fade_images=0"]}
COUNT, CLASSES = 200, 10


def write_pictures(folder: Path, size: int) -> None:
    """Write noise in class folders, or in the two domains of translation."""
    draw = np.random.default_rng(0)
    for i in range(COUNT):
        for part in (f"class{i % CLASSES}", "trainA", "trainB"):
            path = folder / ("domains" if part.startswith("train") else "classes") / part
            path.mkdir(parents=True, exist_ok=True)
            noise = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path / f"{i}.png", compress_level=1)


def train(name: str, folder: Path, steps: int) -> tuple[int, str]:
    """Return the peak memory in bytes of the process that trains a recipe, and its trouble."""
    size = SIZES.get(name, 32)
    pictures = folder / f"{size}"
    if not pictures.exists():
        write_pictures(pictures, size)
    unpaired = recipe.load(name).get("data", {}).get("pair") == "unpaired"
    settings = ["train.precision=fp32", "train.grids=0", "train.watches=0"]
    command = [sys.executable, "-m", "trilemma", "train", name, "--size", str(size)]
    command += ["--data", str(pictures / ("domains" if unpaired else "classes"))]
    if "captions" in recipe.load(name)["about"]["needs"]:
        command += ["--captions", "a picture of {label}"]
    command += ["--steps", str(steps), "--device", "cpu", "--json"]
    for change in settings + CHANGES.get(name, []):
        command += ["--set", change]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=said
        )
        _, status, usage = os.wait4(child.pid, 0)  # what this child took, not all children
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        trouble = said.read().decode(errors="replace").strip() if child.returncode else ""
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, trouble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", help="all, if none is named")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    print("| recipe | parameters | batch | pictures | peak, MiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for name in args.recipes or recipe.names():
            spec, size = recipe.load(name), SIZES.get(name, 32)
            for need in spec["about"]["needs"]:  # a run that this recipe uses
                if need.startswith("runs/") and not (Path(place) / need).exists():
                    train(need.removeprefix("runs/"), Path(place), args.steps)
            shutil.rmtree(Path(place) / "runs" / name, ignore_errors=True)
            peak, trouble = train(name, Path(place), args.steps)
            told = f"{peak / 2**20:.0f}" if not trouble else trouble.splitlines()[-1]
            print(
                f"| {name} | {spec['about']['parameters']:,} | {spec['train']['batch']} | "
                f"3x{size}x{size} | {told} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
