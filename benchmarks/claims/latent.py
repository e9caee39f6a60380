"""Claim 4: diffusion on latents reaches the same quality sooner than diffusion on pixels.

Rombach, Blattmann, Lorenz, Esser, Ommer (2022), "High-Resolution Image Synthesis with Latent
Diffusion Models", section 4.1: at equal training, latents at a quarter of the side or an eighth
have much lower FIDs than pixels, and are drawn faster.

Emoji at 64 pixels. The same network, of the recipe `quick-diffusion` (64 channels on its finer maps
and 128 on the coarser), works on pixels folded in patches, of 4 (maps of 16 x 16, as the recipe has
it at 64 pixels) and of 2 (32 x 32), and on the latents of `kl-f4` (16 x 16). All train alike, with
the recipe's batches and optimizer, for the same time of one processor core, which other work on the
machine does not spend. Time to compute the latents that are kept belongs to the latent side; its
first stage, trained before on the same pictures, is shown both left out and added: it is trained
once, and serves every model after.

At each look the averaged weights draw pictures (Euler, without guidance), which EfficientNet-Lite0
compares with the test pictures (Fréchet distance); looks are not training time. Time to equal
distance: as in progressive.py. The test pictures through the first stage bound what latents reach.

    python benchmarks/claims/latent.py
"""

import shutil
import time
from collections.abc import Callable

import common
import torch
from matplotlib import pyplot
from progressive import TARGETS, Trace, reached

from trilemma import data as pictures
from trilemma import device, edit, latents, recipe, stepping, training
from trilemma.batch import to_float
from trilemma.data import Dataset, batches
from trilemma.run import Run
from trilemma.settings import Length, Settings

NETWORK = ["model.network.channels=[64, 128]", "model.network.blocks=[2, 4]"]
LIKE = ["train.batch=32", "train.warmup=3000", *NETWORK]  # of quick-diffusion, for both recipes
SIDES = {
    "pixels, patches of 4": ("quick-diffusion", ["model.network.patch=4", *LIKE]),
    "pixels, patches of 2": ("quick-diffusion", ["model.network.patch=2", *LIKE]),
    "latents": ("latent-diffusion", ["model.network.patch=1", *LIKE]),
}
CPU = torch.device("cpu")


def begin(name: str, changes: list[str], data: Dataset, seed: int) -> Run:
    """Return a run of a recipe at its beginning, in a new folder."""
    spec = recipe.resolve(recipe.override(recipe.load(name), changes), training.facts(data))
    spec["run"] = {"recipe": name, "data": data.name, "size": data.shape[1], "seed": seed}
    settings = Settings(**spec["train"])
    torch.manual_seed(seed)
    model = recipe.build(spec["model"])
    training.load_frozen(model)
    training.measure(model, data)
    device.prepare(model, CPU, device.dtype(settings.precision, CPU))
    out = common.RUNS / "latent" / name
    shutil.rmtree(out, ignore_errors=True)
    return Run(model, spec, settings, Length(images=10**9), data, out, 0, CPU)


def fit(
    run: Run, seconds: float, looks: int = 0, look: Callable[[Run], float] | None = None
) -> tuple[Trace, float]:
    """Train for so many seconds of a core.

    Returns:
        (minutes, distance) at each look, the last at the end; and the seconds of them in which
        latents to be kept were computed.
    """
    batch, start = run.settings.batch, time.process_time()
    kept = latents.keep(run.model, run.data, False, run.length, batch, CPU)
    spent = filling = time.process_time() - start
    stream = batches(run.data, batch, seed=run.seed, kept=kept)
    trace: Trace = []
    passed = 0
    while spent < seconds or not run.progress.step:
        start = time.process_time()
        part = next(stream)
        for phase in run.phases:
            if run.progress.step % phase.every or run.progress.seen < phase.start:
                continue
            _, trouble = stepping.take(run, phase, part, run.rate(min(spent / seconds, 1)))
            if trouble:
                raise SystemExit(f"{run.spec['run']['recipe']}: {trouble}")
        run.update_average(batch)
        run.progress.step += 1
        run.progress.seen += batch
        spent += time.process_time() - start
        due = int(min(spent / seconds, 1) * looks + 1e-9)
        if look is not None and due > passed:
            trace.append((spent / 60, look(run)))
            passed = due
    return trace, filling


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="of a core, for each side")
    parser.add_argument("--stage-minutes", type=float, default=2.5, help="of the first stage")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures")
    parser.add_argument("--looks", type=int, default=6, help="at each side")
    parser.add_argument("--n", type=int, default=400, help="pictures drawn at a look")
    parser.add_argument("--steps", type=int, default=10, help="in which they are drawn")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (
        pictures.load(given.data, split=split, size=given.size, multiple=8)
        for split in ("train", "test")
    )
    distance = common.Distance(test)

    stage = begin("kl-f4", [], train, given.seed)
    fit(stage, 60 * given.stage_minutes)
    stage.save()
    whole = test.tensor(slice(None))
    restored = edit.reconstruct(stage.trained(), whole)
    error = (to_float(restored) - to_float(whole)).square().mean()
    bound = distance(restored)
    common.tell("first stage", seen=stage.progress.seen, fd=bound, error=float(error))

    drawing: dict[str, list[float]] = {side: [] for side in SIDES}
    traces: dict[str, Trace] = {}
    seen, rates, shown, filling = {}, {}, {}, 0.0
    for side, (name, changes) in SIDES.items():

        def look(run: Run, side: str = side) -> float:
            start = time.process_time()
            drawn = run.trained().sample(given.n, steps=given.steps, guidance=1.0)
            drawing[side].append(given.n / (time.process_time() - start))
            shown[side] = drawn[:16]
            found = distance(drawn)
            common.tell(f"{side}, {run.progress.seen:,} images", fd=found)
            return found

        own = [f'model.codec.stage.path="{stage.out}"'] if side == "latents" else []
        run = begin(name, [*changes, *own], train, given.seed)
        seconds = 60 * given.minutes
        traces[side], computing = fit(run, seconds, given.looks, look)
        filling = max(filling, computing)
        seen[side] = run.progress.seen
        rates[side] = run.progress.seen / (60 * traces[side][-1][0] - computing)
    both = "latents, and first stage"
    traces[both] = [(at + given.stage_minutes, fd) for at, fd in traces["latents"]]

    figure, axes = pyplot.subplots(1, 1 + len(SIDES), figsize=(15, 4), layout="constrained")
    for side, trace in traces.items():
        axes[0].plot(*zip(*trace, strict=True), "o--" if side == both else "o-", label=side)
    axes[0].axhline(bound, color="grey", lw=1, label="test pictures through the first stage")
    axes[0].set(xlabel="minutes of a core", ylabel="FD-Lite0", yscale="log")
    axes[0].legend(fontsize=8)
    for place, (side, drawn) in zip(axes[1:], shown.items(), strict=True):
        rows = [torch.cat(list(row), dim=2) for row in drawn.split(4)]
        place.imshow(torch.cat(rows, dim=1).permute(1, 2, 0).squeeze(-1))
        place.set(title=side, xticks=[], yticks=[])
    given.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out / "latent.png", dpi=120)

    def row(title: str, numbers: dict[str, float], form: str) -> tuple[str, ...]:
        return title, *(f"{numbers[s]:{form}}" if s in numbers else "" for s in traces)

    rows = [
        row("pictures seen", seen, ",.0f"),
        row("training, images/s", rates, ".0f"),
        row("drawing, images/s", {side: max(found) for side, found in drawing.items()}, ".1f"),
        row("FD-Lite0 at the end", {side: trace[-1][1] for side, trace in traces.items()}, ".0f"),
    ]
    worse = max(trace[-1][1] for trace in traces.values())
    for target in (factor * worse for factor in TARGETS):
        if any(trace[0][1] <= target for trace in traces.values()):
            continue
        found = {side: reached(trace, target) for side, trace in traces.items()}
        cells = (f"{at:.2f}" if at is not None else "not" for at in found.values())
        rows.append((f"minutes to FD-Lite0 {target:.0f}", *cells))
    floor = distance(train.images[: given.n])
    common.publish(
        f"{given.data} at {train.shape[1]} pixels, {len(train):,} training pictures; seed "
        f"{given.seed}; {given.minutes:g} minutes of a core a side, of which {filling:.0f} s "
        f"computed the latents; {given.n} pictures drawn in {given.steps} steps and {len(test)} "
        f"test pictures at a look; {given.n} real training pictures score {floor:.0f}. First "
        f"stage: {given.stage_minutes:g} minutes, {stage.progress.seen:,} pictures; it restores "
        f"the test pictures with a mean squared error of {error:.4f} on [-1, 1], and these score "
        f"{bound:.0f}.",
        ("", *traces),
        rows,
    )


if __name__ == "__main__":
    main()
