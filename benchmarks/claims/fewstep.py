"""Claim: a student draws in one to four network calls nearly as well as its teacher in 1,000.

Song, Dhariwal, Chen, Sutskever (2023), "Consistency Models"; Salimans & Ho (2022), "Progressive
Distillation for Fast Sampling of Diffusion Models"; Liu, Gong, Liu (2023), "Flow Straight and
Fast". To be reached here: at 4 calls at most 1.25 times, at 1 call at most 2 times the distance of
the teacher's DDPM, at 100 to 1,000 times its images/s.

One teacher, and students of it by each method and for each number of calls, all trained on equally
many images; `consistency` from scratch beside them if asked. A consistency model is one student for
all numbers of calls. EfficientNet-Lite0 compares pictures of the same seeds with all test pictures
(Fréchet distance, coverage). The teacher draws by DDPM, and by its best solver in as few calls as
its students. Speed is of one model alone, in batches of 100.

    python benchmarks/claims/fewstep.py --run runs/claims/triangle/quick-diffusion
"""

import time
from pathlib import Path

import common
import torch

import trilemma
from trilemma import data as pictures
from trilemma.distilling import METHODS, distill
from trilemma.drawing import grid
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.metrics.prdc import density_coverage
from trilemma.sampling import Trained


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the teacher's")
    parser.add_argument("--data", default="fashion-mnist", help="what it was trained on")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--images", type=int, default=100_000, help="training images of a student")
    parser.add_argument("--scratch", action="store_true", help="the recipe consistency too")
    parser.add_argument("--long", type=int, default=1000, help="calls of the teacher's DDPM")
    parser.add_argument("--guidance", type=float, help="that students learn; the teacher's own")
    parser.add_argument("--n", type=int, default=1000, help="pictures of each")
    given = parser.parse_args()
    teacher = trilemma.load(given.run)
    side = teacher.data["shape"][1]
    test = pictures.load(given.data, split="test", size=side)
    see = extractor("lite0")
    real = see(test.images).pooled
    truth = statistics(real)
    scale = given.guidance
    if scale is None:
        scale = teacher.sample_defaults.get("guidance", 1.0)

    def judge(name: str, trained: Trained, calls: int, **options: object) -> list[float]:
        began = time.perf_counter()
        drawn = trained.sample(given.n, batch=100, **options)
        rate = given.n / (time.perf_counter() - began)
        seen = see(drawn, pooled_only=True).pooled
        distance = frechet_distance(statistics(seen), truth)
        _, coverage = density_coverage(real[: given.n], seen)
        sheets.append(drawn[:10])
        common.tell(f"{name}, {calls} calls", fd=distance, coverage=coverage, rate=rate)
        return [calls, distance, coverage, rate]

    sheets: list[torch.Tensor] = []
    guided = {"guidance": scale} if scale != 1 else {}
    found = {("teacher, ddpm", given.long): judge(
        "ddpm", teacher, given.long, solver="ddpm", steps=given.long, **guided
    )}  # fmt: skip
    for calls in given.calls:
        found["teacher, dpmpp_2m", calls] = judge(
            "dpmpp_2m", teacher, calls, solver="dpmpp_2m", steps=calls, **guided
        )
    students: dict[tuple[str, int], Trained] = {}
    for method in given.methods:
        for calls in given.calls[:1] if method == "consistency" else given.calls:
            out = common.RUNS / "fewstep" / f"{method}-{calls}-{given.images}"
            trained = distill(
                given.run, calls, method=method, guidance=given.guidance, data=given.data, out=out,
                images=given.images, resume=True, quiet=True,
            )  # fmt: skip
            common.tell(f"{method}, {calls} calls, trained", **trained.progress)
            students[method, calls] = trained
    if given.scratch:
        students["from scratch", 1] = common.train(
            "consistency", pictures.load(given.data, size=side), "fewstep", "scratch",
            images=given.images,
        )  # fmt: skip
    for (method, calls), trained in students.items():
        alone = method in ("consistency", "from scratch")
        for steps in given.calls if alone else [calls]:
            found[method, steps] = judge(method, trained, steps, steps=steps)
    _, best, _, slow = found["teacher, ddpm", given.long]
    given.out.mkdir(parents=True, exist_ok=True)
    grid(torch.cat(sheets), 10).save(given.out / "fewstep.png")
    calls_with = "two passes" if scale != 1 else "one pass"
    common.publish(
        f"{teacher.name} after {teacher.progress['seen']:,} images, guidance {scale:g} "
        f"({calls_with} of the teacher's network a call); students after {given.images:,} images "
        f"each; seeds 0 to {given.n - 1}; FD-Lite0 to {len(test):,} test pictures, coverage of "
        f"{given.n:,} of them; in the order of the rows of fewstep.png.",
        ("drawn by", "calls", "FD-Lite0", "of DDPM's", "coverage", "images/s", "of DDPM's"),
        [
            (
                name, f"{calls:.0f}", f"{fd:.0f}", f"{fd / best:.2f}", f"{coverage:.2f}",
                f"{rate:.1f}", f"{rate / slow:.0f}",
            )
            for (name, _), (calls, fd, coverage, rate) in found.items()
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
