"""From a run of a diffusion model to one that draws in a few steps.

A student is a recipe made of the teacher's: the same network, codec, conditioner and schedule, the
teacher's weights to begin with, and another objective. So it trains, resumes, samples and compares
as any run does. The recipe is written into the student's folder. What is shared of a student is a
plain diffusion model: the teacher is in the run's training state alone.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import tomli_w

from trilemma import checkpoint, recipe, sampling
from trilemma.data import Dataset
from trilemma.data import load as load_data
from trilemma.errors import UserError
from trilemma.models.diffusion import Diffusion
from trilemma.sampling import Trained
from trilemma.training import train

METHODS = {
    "adversarial": "Kim et al. 2024; Sauer et al. 2023",
    "consistency": "Song et al. 2023; Geng et al. 2024",
    "progressive": "Salimans & Ho 2022",
    "reflow": "Liu, Gong, Liu 2023",
}
"""Each method and its papers."""

MOST = 64  # steps of a student
PROGRESSIVE = 4  # steps from which on progressive distillation is the better in equal time
COARSEST = 8  # steps, at least, of the first student of progressive distillation
SLOWER = 4  # by how much less than the teacher's the learning rate of a student is
SMALLEST = 8  # side of what a critic looks at
CRITIC = {"type": "adam", "lr": 2e-3, "betas": [0.5, 0.99]}  # its optimizer, as in the recipe gan
MOMENTUM = 0.9  # of Muon where the student plays against a critic


def distill(
    run: str | Path,
    to: int,
    *,
    method: str | None = None,
    guidance: float | None = None,
    data: str | Path | Dataset | None = None,
    out: str | Path | None = None,
    budget: float | None = None,
    images: int | None = None,
    seed: int = 0,
    overrides: tuple[str, ...] = (),
    resume: bool = False,
    device_name: str | None = None,
    quiet: bool = False,
) -> Trained:
    """Train a student that draws in `to` network calls as the teacher draws in many.

    Args:
        run: the teacher, a run of any diffusion model.
        to: steps that the student samples with unless told otherwise.
        method: one of `METHODS`; None for the best in equal time (claim 15): adversarial for 1 to 3
            steps, progressive for more.
        guidance: the scale that the student learns to draw at; None for the teacher's default.
        data: pictures; None for those that the teacher was trained on.
        out: the student's run folder; None for `RUN-METHOD-TO` beside the teacher's. Progressive
            distillation has the runs of more steps in its folder `halvings`.
        budget: seconds of training; or `images`; else half the images that the teacher has seen.
            Progressive distillation divides them evenly among its halvings.
        images: training images to see.
        seed: of everything random.
        overrides: `section.key=value` changes to the student's recipe.
        resume: go on with the student in `out`.
        device_name: `cpu`, `cuda` or `mps`; None picks the fastest there is.
        quiet: show nothing.

    Raises:
        UserError: no such steps or method, a run of another family, or as `train`.
    """
    if not 1 <= to <= MOST:
        raise UserError(
            f"--to is {to}; a student takes at least 1 step, such as --to 1, 2 or 4, and at most "
            f"{MOST}: more are what its teacher takes"
        )
    if method is None:
        method = "adversarial" if to < PROGRESSIVE else "progressive"
    if method not in METHODS:
        raise UserError(f"there is no method '{method}'; expected one of {', '.join(METHODS)}")
    teacher = sampling.load(run, "cpu")
    if not isinstance(teacher.model, Diffusion):
        raise UserError(
            f"{run} is a {teacher.name}, whose {type(teacher.model).__name__} takes no steps that "
            "could be fewer; give the run of a diffusion model"
        )
    if teacher.sample_defaults.get("solver") == "consistency":
        raise UserError(
            f"{run} is a consistency model, which knows pictures and no paths to them; give the "
            "run of the diffusion model that it was distilled from, or sample it in fewer steps"
        )
    _, *sides = teacher.model.codec.shape
    if method == "adversarial" and max(sides) < SMALLEST:
        raise UserError(
            f"{run} draws maps of {sides[0]} x {sides[1]}, which are too small for the critic of "
            "the method adversarial; use --method consistency"
        )
    guidable = teacher.model.conditioner.guidable
    if guidance is None:
        guidance = float(teacher.sample_defaults.get("guidance", 1.0)) if guidable else 1.0
    if not math.isfinite(guidance):
        raise UserError(f"guidance is {guidance}; expected a finite number")
    if guidance != 1 and not guidable:
        raise UserError(
            f"guidance {guidance:g} needs a teacher trained with labels or attributes and with "
            "conditioner.dropout above 0; use guidance 1"
        )
    path = Path(run)
    folder = (path.parent if path.is_file() else path).resolve()
    if not path.exists():  # the name of a packaged model
        run = checkpoint.model_file(run)
    out = Path(out) if out is not None else folder.with_name(f"{folder.name}-{method}-{to}")
    if data is None:
        data = teacher.data["name"]
    if images is not None and images < 1:
        raise UserError(f"asked to train on {images} images; expected at least 1")
    if teacher.conditional:
        known, pictures = teacher.data["label_names"], data
        if not isinstance(pictures, Dataset):  # read as training will, so decoded once
            multiple = teacher.recipe.get("data", {}).get("multiple", 1)
            side = teacher.data["shape"][1]
            pictures = load_data(pictures, split="train", size=side, multiple=multiple)
        if pictures.label_names != known:
            raise UserError(
                f"{pictures.name} has the classes {', '.join(pictures.label_names) or 'none'} and "
                f"{run} knows {', '.join(known)}; give pictures of the same classes as --data"
            )
    if budget is None and images is None:
        images = max(teacher.progress["seen"] // 2, 1)
    stages = [to]
    while method == "progressive" and stages[0] < COARSEST:
        stages.insert(0, 2 * stages[0])
    for place, steps in enumerate(stages):
        last = place == len(stages) - 1
        place_out = out if last else out / "halvings" / str(steps)
        name = place_out / f"{teacher.name}-{method}-{steps}.toml"
        began = (place_out / "training").exists()
        if began and not resume:
            raise UserError(
                f"{place_out} already holds a run; add --resume to go on, or take another --out"
            )
        spec = student(sampling.load(run, "cpu"), run, method, steps, guidance)
        if not began:
            place_out.mkdir(parents=True, exist_ok=True)
            name.write_bytes(tomli_w.dumps(spec).encode())
        elif not name.exists() or recipe.load(name)["model"] != spec["model"]:
            raise UserError(
                f"{place_out} was begun as another student; resume with the same teacher, method, "
                "steps and guidance, or start anew in another --out"
            )
        trained = train(
            name,
            data,
            out=place_out,
            size=teacher.data["shape"][1],
            budget=None if budget is None else budget / len(stages),
            images=None if images is None else max(images // len(stages), 1),
            seed=seed,
            overrides=overrides,
            resume=began,
            device_name=device_name,
            quiet=quiet,
        )
        run, guidance = place_out, 1.0
    return trained


def student(
    teacher: Trained, run: str | Path, method: str, steps: int, guidance: float
) -> dict[str, Any]:
    """Return the recipe of a student.

    Args:
        teacher: the trained model.
        run: where it was read from.
        method: one of `METHODS`.
        steps: of the student.
        guidance: of the teacher.
    """
    theirs = teacher.recipe
    assert isinstance(teacher.model, Diffusion)
    left = ("type", "weight", "loss", "uncertainty", "pairing", "dequantise")
    model: dict[str, Any] = {"type": "models.diffusion.Diffusion"}
    model |= {key: _plain(value) for key, value in theirs["model"].items() if key not in left}
    if "dropout" in model["network"]:
        model["network"]["dropout"] = 0.0
    if model.get("target", "noise") in ("noise", "image"):
        model["target"] = "straight"  # says the picture even where there is nothing but noise
    if method == "reflow":
        model |= {"target": "straight", "schedule": {"type": "diffusion.schedules.Straight"}}
    _never_dropped(model.get("conditioner", {}))
    own: dict[str, Any] = {
        "consistency": {"type": "models.consistency.Consistency", "gap": 0.5},
        "adversarial": {
            "type": "models.consistency.Adversarial",
            "steps": steps,
            "critic": {
                "type": "networks.residual.Critic",
                "shape": list(teacher.model.codec.shape),
                "classes": teacher.model.conditioner.classes,
            },
        },
        "progressive": {"type": "models.distillation.Progressive", "steps": steps},
        "reflow": {"type": "models.distillation.Reflow", "steps": steps},
    }[method]
    objective = own | {"guidance": guidance, "teacher": {"type": "trained", "path": str(run)}}
    settings = copy.deepcopy(theirs["train"])
    settings.pop("phases", None)
    optimizer = settings.setdefault("optimizer", {"type": "adam", "lr": 2e-4})
    for rate in ("lr", "adam_lr"):
        if rate in optimizer:
            optimizer[rate] /= SLOWER
    if method == "adversarial":
        if optimizer["type"] == "muon":
            optimizer["momentum"] = MOMENTUM
        settings |= {"optimizer": dict(CRITIC), "phases": {"student": optimizer}}
    settings |= {"schedule": "cosine", "warmup": min(settings.get("warmup", 0), 3_000)}
    settings |= {"images": max(teacher.progress["seen"] // 2, 1)}
    sample: dict[str, Any] = {
        "consistency": {"solver": "consistency"},
        "adversarial": {"solver": "consistency"},
        "progressive": {"solver": "ddim", "grid": "even_share"},
        "reflow": {"solver": "euler"},
    }[method]
    about = theirs["about"]
    return {
        "about": {
            **{key: value for key, value in about.items() if key != "memory"},
            "summary": f"{teacher.name} drawn in few steps: {method}",
            "paper": METHODS[method],
        },
        "data": dict(theirs.get("data", {})),
        "model": model | {"objective": objective},
        "train": settings,
        "sample": sample | {"steps": steps},
    }


def _plain(spec: Any) -> Any:
    """Return a copy without the runs that frozen parts came from: they are in the teacher's file.

    The student takes a codec's weights from the teacher, wherever that had them from.
    """
    if isinstance(spec, list):
        return [_plain(item) for item in spec]
    if not isinstance(spec, dict):
        return spec
    frozen = spec.get("type") == "model.Frozen"
    return {k: _plain(v) for k, v in spec.items() if not (frozen and k == "path")}


def _never_dropped(conditioner: dict[str, Any]) -> None:
    """Set dropout to 0: a student is always told, and cannot be guided further."""
    for part in [conditioner, *conditioner.get("parts", [])]:
        if part.get("type") in _DROPPING:
            part["dropout"] = 0.0


_DROPPING = ("conditioning.Labels", "conditioning.LabelChannels", "conditioning.Attributes")
