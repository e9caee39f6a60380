"""A trained model: seeds -> images."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilemma import adapters, checkpoint, device, guides, recipe
from trilemma.batch import Condition, Rng, to_uint8
from trilemma.batching import Batching
from trilemma.conditioning import reads_text
from trilemma.diffusion.guidance import Guidance
from trilemma.errors import UserError
from trilemma.model import DrawsEmbeddings, Generator, HasOwnOptions, Matches, Model, TellsClasses

GUIDANCE = {
    "guidance": "scale",
    "guidance_interval": "interval",
    "guidance_rescale": "rescale",
    "guide_with": "weaker",
    "classifier": "classifier",
    "classifier_scale": "classifier_scale",
    "guide": "guide",
    "guide_scale": "guide_scale",
    "negative": "negative",
    "clip": "clip",
    "clip_scale": "clip_scale",
    "crops": "crops",
}
"""The options that guide, and what each is of a `Guidance`. `guide_with`, `classifier` and `clip`
are runs, by path or loaded; `guide` is a function, by module:function or itself."""

OF = {"classifier_scale": "classifier", "guide_scale": "guide", "clip_scale": "clip"}
OF |= {"crops": "clip", "guidance_interval": "guidance", "guidance_rescale": "guidance"}
"""Options that say something of another, and nothing without it."""


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to sample.

    Attributes:
        model: averaged weights, in evaluation mode, on its device.
        recipe: the resolved recipe that built it.
        data: facts of the training data: `name`, `shape` (C, H, W), `label_names`, ...
        progress: `step`, `seen` (images), `elapsed` (seconds of training).
        path: the run folder or file it was read from; None while training.
        tuned: grids found for it (`tuning`): `solver`, `steps`, and the `times` it then steps by.
    """

    model: Model
    recipe: dict[str, Any]
    data: dict[str, Any]
    progress: dict[str, Any]
    path: Path | None = None
    tuned: Sequence[dict[str, Any]] = ()

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe["run"]["recipe"]

    @property
    def where(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of matrix products, that which it was trained in."""
        return device.dtype(self.recipe["train"].get("precision", "auto"), self.where)

    @property
    def sample_defaults(self) -> dict[str, Any]:
        """The recipe's defaults for `sample`; guidance only where there is what to guide by.

        Never a function or another run: a recipe may come with a checkpoint from elsewhere.
        """
        left = {"guide", "guide_with", "classifier", "clip"}
        if not (self.conditional or self.reads or recipe.find(self.recipe["model"], "attributes")):
            left |= {"guidance", "guidance_interval", "guidance_rescale"}
        return {k: v for k, v in self.recipe.get("sample", {}).items() if k not in left}

    @property
    def conditional(self) -> bool:
        """Whether the model was trained with class labels."""
        return bool(recipe.find(self.recipe["model"], "classes"))

    @property
    def reads(self) -> bool:
        """Whether the model draws by texts."""
        return reads_text(self.model)

    @property
    def translates(self) -> bool:
        """Whether the model draws from given pictures (`translate`), and nothing without them."""
        return self.recipe.get("data", {}).get("pair") == "unpaired"

    @property
    def enlarges(self) -> bool:
        """Whether the model draws larger pictures from given ones, and nothing without them."""
        return self.recipe.get("data", {}).get("pair") == "shrunk"

    @property
    def repairs(self) -> bool:
        """Whether the model draws what given pictures lack, and nothing without them."""
        return self.recipe.get("data", {}).get("pair") == "damaged"

    @property
    def classifies(self) -> bool:
        """Whether the model tells classes, and draws nothing."""
        return isinstance(self.model, TellsClasses)

    @property
    def matches(self) -> bool:
        """Whether the model tells which pictures and texts belong together, and draws nothing."""
        return isinstance(self.model, Matches)

    @property
    def draws(self) -> bool:
        """Whether the model draws pictures of its own."""
        given = self.translates or self.enlarges or self.repairs
        return isinstance(self.model, Generator) and not given

    @property
    def generator(self) -> Generator:
        """The model as what draws; raises UserError when it draws nothing."""
        if self.classifies:
            raise UserError(
                f"{self.name} draws no pictures: it tells classes, and guides a diffusion model "
                f"with trilemma sample RUN --classifier {self.path} --out DIR"
            )
        if self.matches:
            raise UserError(
                f"{self.name} draws no pictures: it tells which go with which words, with "
                f"trilemma search {self.path} PICTURES --text WORDS"
            )
        if isinstance(self.model, DrawsEmbeddings):
            raise UserError(
                f"{self.name} draws no pictures but embeddings of them; with a run of "
                f"unclip-decoder, trilemma join --prior {self.path} --decoder RUN --out DIR makes "
                "one that draws pictures"
            )
        if not isinstance(self.model, Generator):
            raise UserError(
                f"{self.name} draws no pictures: its {type(self.model).__name__} is a first stage, "
                "for another model to draw its latents or codes; to see what it keeps of pictures, "
                f"trilemma edit reconstruct {self.path} PICTURES --out DIR"
            )
        return self.model

    def options(self, given: Mapping[str, Any], verb: str = "sample") -> dict[str, Any]:
        """Return the complete options of sampling: the recipe's defaults, then `given`.

        Functions and models among them are given by name, as they are written into pictures. Of
        another verb of the family's the defaults are its own, but for guidance.

        Of the recipe's, a solver's own options go with that solver. The grid is the one tuned for
        the solver and its steps, if there is one and no other was asked for.

        Raises:
            UserError: an option that this family's `sample`, or other verb, does not have, that is
                no number where one is needed, or that is of another that is not given.
        """
        parameters = inspect.signature(getattr(self.generator, verb)).parameters
        named = {k: v for k, v in parameters.items() if v.kind is not v.VAR_KEYWORD}
        own = ("image", "mask", "condition", "rng")
        accepted = [name for name in named if name not in own]
        if "guidance" in accepted:
            accepted += [name for name in GUIDANCE if name != "guidance"]
        asked = {k: v for k, v in given.items() if v is not None}
        chosen = self.sample_defaults
        if verb != "sample":
            chosen = {name: value for name, value in chosen.items() if name in GUIDANCE}
        if asked.get("solver", chosen.get("solver")) != chosen.get("solver"):
            chosen = {k: v for k, v in chosen.items() if k in accepted}
        chosen |= asked
        if verb == "sample" and isinstance(self.model, HasOwnOptions):
            accepted += self.model.own_options(chosen)
        for name in chosen:
            if name not in accepted:
                raise UserError(
                    f"{self.name} cannot be sampled with '{name}'"
                    f"{recipe.suggest(name, accepted)}; it takes {', '.join(accepted) or 'none'}"
                )
        for name, value in asked.items():
            usual = named[name].default if name in named else None
            whole = type(usual) is int
            if whole and not isinstance(value, int) or type(usual) is float and _no_number(value):
                kind = "whole number" if whole else "number"
                raise UserError(f"{name} is {value!r}; expected a {kind}, such as {usual}")
            what = OF.get(name)
            if value and what and chosen.get(what, 1) in (1, None):
                raise UserError(
                    f"{name} says something of {what}, and there is none; "
                    f"give {what} too{', above 1' if what == 'guidance' else ''}, or leave it out"
                )
        stepping = {k: chosen.get(k, named[k].default) for k in ("solver", "steps") if k in named}
        for grid in self.tuned if verb == "sample" and "grid" not in asked else []:
            if stepping == {k: grid[k] for k in stepping}:
                chosen["grid"] = grid["times"]
        return {name: _named(value) for name, value in chosen.items()}

    def opened(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options with the runs and functions that they name in place of the names.

        Raises:
            UserError: there is no such run or function, or the run is not of the kind needed.
        """
        opened = dict(given)
        for name in ("guide_with", "classifier", "clip"):
            if isinstance(opened.get(name), str | Path):
                opened[name] = load(opened[name], self.where.type)
        judge = opened.get("classifier")
        if judge is not None and not judge.classifies:
            raise UserError(
                f"{judge.path} is a {judge.name}, which tells no classes; train the recipe "
                "classifier on the same pictures"
            )
        if judge is not None and self.conditional:
            ours, theirs = self.data["label_names"], judge.data["label_names"]
            if ours != theirs:
                raise UserError(
                    f"the classifier knows {', '.join(theirs)} and the model {', '.join(ours)}; "
                    "train one on the same pictures"
                )
        clip = opened.get("clip")
        if clip is not None and not clip.matches:
            raise UserError(
                f"{clip.path} is a {clip.name}, which does not know how well a text fits a "
                "picture; give a run of the recipe clip"
            )
        if clip is not None and clip.data["shape"] != self.data["shape"]:
            raise UserError(
                f"{clip.path} sees pictures of {clip.data['shape']} and {self.name} draws "
                f"{self.data['shape']}; train one at the other's --size"
            )
        weaker = opened.get("guide_with")
        if weaker is not None and type(weaker.model) is not type(self.model):
            raise UserError(
                f"{weaker.path} is a {weaker.name}, which cannot guide a {self.name}; give a run "
                "of the same family on the same pictures: smaller, or trained for less long"
            )
        if isinstance(opened.get("guide"), str):
            opened["guide"] = guides.find(opened["guide"])
        return opened

    def labels(
        self, n: int, label: str | int | None, judge: Trained | None = None
    ) -> Tensor | None:
        """Return (n,) class indices: `label` for all, or the classes in turn when it is None.

        The classes are those of `judge`, the classifier that guides, where the model knows none.

        Raises:
            UserError: the model knows no classes, or not this one.
        """
        known = (judge or self).data["label_names"]
        if not (self.conditional or judge):
            if label is not None:
                raise UserError(f"{self.name} was trained without classes; leave the label out")
            return None
        if label is None:
            return torch.arange(n) % len(known)
        if str(label) in known:
            return torch.full((n,), known.index(str(label)))
        if str(label).isdigit() and int(label) < len(known):
            return torch.full((n,), int(label))
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(known))
        raise UserError(
            f"no class '{label}'{recipe.suggest(str(label), known)}; the model knows {listed}"
        )

    def attributes(self, rng: Rng, names: Sequence[str] | None) -> Tensor | None:
        """Return (B, A) of 0 and 1: those in `names` 1; drawn as in the training data when None.

        Takes one draw of `rng` in either case, so that a seed's picture stays the same otherwise.

        Raises:
            UserError: the model reads no attributes, or not one of these.
        """
        known = self.data["attribute_names"]
        spec = self.recipe["model"]
        if self.conditional or not recipe.find(spec, "attributes"):
            if names is not None:
                raise UserError(f"{self.name} was trained without attributes; leave them out")
            return None
        drawn = rng.uniform(len(known))
        if names is None:
            shares = torch.tensor(self.data["attribute_shares"], device=rng.device)
            return (drawn < shares).float()
        for name in names:
            if name not in known:
                raise UserError(
                    f"no attribute '{name}'{recipe.suggest(name, known)}; "
                    f"the model knows {', '.join(known)}"
                )
        chosen = torch.tensor([float(name in names) for name in known], device=rng.device)
        return chosen.expand(len(rng), -1)

    def texts(
        self, n: int, text: str | Sequence[str] | None, judge: Trained | None = None
    ) -> list[str] | None:
        """Return n texts: those given in turn, or some of the training captions when None.

        They may be for `judge` alone, the run of CLIP that guides.

        Raises:
            UserError: the model reads no texts, or there are none.
        """
        if text is None and judge is not None:
            raise UserError("guidance by CLIP goes towards a text: say --text, or text=")
        if not self.reads and judge is None:
            if text is None:
                return None
            takes = [
                what
                for what, known in (
                    ("a label", self.conditional),
                    ("attributes", recipe.find(self.recipe["model"], "attributes")),
                )
                if known
            ]
            raise UserError(
                f"{self.name} was trained without captions and reads no text; "
                + (f"it takes {' and '.join(takes)}" if takes else "leave the text out")
                + "; a run of the recipe clip can guide it towards one (--clip)"
            )
        given = [text] if isinstance(text, str) else text
        if given is None:
            given = self.data.get("captions") or [""]
        if not given:
            raise UserError("an empty list of texts was given; expected at least one")
        return [given[i % len(given)] for i in range(n)]

    def batches(
        self,
        n: int,
        *,
        seed: int = 0,
        label: str | int | None = None,
        attributes: Sequence[str] | None = None,
        text: str | Sequence[str] | None = None,
        batch: int | Batching | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """Draw `n` images in batches, uint8 (B, C, H, W) on the CPU.

        Image i draws from the stream of seed + i: it does not depend on `n` or `batch`, which None
        chooses by the memory there is (`batching`).

        Raises:
            UserError: an unknown option, class or attribute; text for a model that reads none; `n`
                or `batch` below 1; a model that translates or enlarges; too little memory.
        """
        if self.translates:
            raise UserError(
                f"{self.name} translates pictures and draws none of its own; "
                f"use trilemma translate {self.path} PICTURES --out DIR"
            )
        if self.enlarges:
            raise UserError(
                f"{self.name} enlarges pictures and draws none of its own; "
                f"use trilemma upscale {self.path} PICTURES --out DIR"
            )
        if self.repairs:
            raise UserError(
                f"{self.name} draws what given pictures lack and none of its own; "
                f"use trilemma edit repair {self.path} PICTURES --out DIR, "
                "or edit inpaint for what a mask hides"
            )
        where = self.where
        batching = batch if isinstance(batch, Batching) else Batching(where, batch)
        if n < 1 or batching.size < 1:
            raise UserError(f"asked for {n} images in batches of {batch}; both must be at least 1")
        options = self.opened(options)
        labels = self.labels(n, label, options.get("classifier"))
        texts = self.texts(n, text, options.get("clip"))
        chosen = self.arguments({**self.options(options), **options})
        dtype = self.dtype
        followed = ("guide", "classifier", "clip")
        by_gradients = any(options.get(name) is not None for name in followed)
        without = torch.no_grad if by_gradients else torch.inference_mode
        start = 0

        def draw(count: int) -> Tensor:
            part = None if labels is None else labels[start : start + count].to(where)
            rng = Rng(range(seed + start, seed + start + count), where)
            said = None if texts is None else texts[start : start + count]
            condition = Condition(count, part, self.attributes(rng, attributes), said)
            with without(), device.autocast(dtype, where):
                return self.generator.sample(condition, rng, **chosen)

        while start < n:
            images = batching.draw(draw, n - start)
            if images is None:
                continue
            if not images.isfinite().all():
                raise UserError(
                    f"{self.name} drew images that are not finite; guide it less where it is "
                    "guided, else train it anew"
                )
            yield to_uint8(images).cpu()
            start += len(images)

    def arguments(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return opened options as the family's own function takes them: all that guides as one."""
        given = {name: value for name, value in chosen.items() if value is not None}
        guiding = {GUIDANCE[name]: given.pop(name) for name in GUIDANCE if name in given}
        if guiding.keys() <= {"scale"}:
            return {**given, "guidance": guiding["scale"]} if guiding else given
        for name in ("weaker", "classifier", "clip"):
            if name in guiding:
                guiding[name] = guiding[name].model
        return given | {"guidance": Guidance(**guiding)}

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        label: str | int | None = None,
        attributes: Sequence[str] | None = None,
        text: str | Sequence[str] | None = None,
        batch: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw `n` images, uint8 (n, C, H, W) on the CPU; arguments and errors as `batches`."""
        asked: dict[str, Any] = {"label": label, "attributes": attributes, "text": text, **options}
        return torch.cat(list(self.batches(n, seed=seed, batch=batch, **asked)))


def load(run: str | Path, device_name: str | None = None, lora: Sequence[str] = ()) -> Trained:
    """Load a trained model from a run folder or its `model.safetensors`.

    Args:
        run: the folder or the file.
        device_name: `cpu`, `cuda`, `mps`; None picks the fastest there is.
        lora: LoRA files to put on it, each with a weight: `a.safetensors:0.8` (`adapters`).

    Raises:
        UserError: there is no such run, the file is damaged, or a LoRA does not fit.
    """
    tensors, facts = checkpoint.read_model(run)
    if lora:
        tensors, facts = adapters.put_on(tensors, facts, lora, str(run))
    model = recipe.build(facts["recipe"]["model"])
    checkpoint.load_weights(model, tensors, str(run))
    model.requires_grad_(False).eval()
    where = device.pick(device_name)
    precision = facts["recipe"]["train"].get("precision", "auto")
    device.prepare(model, where, device.dtype(precision, where))
    tuned = facts.get("tuned", ())
    return Trained(model, facts["recipe"], facts["data"], facts["progress"], Path(run), tuned)


def _no_number(value: Any) -> bool:
    return isinstance(value, str | list | dict)


def _named(value: Any) -> Any:
    """Return an option as it is written down: a run by its path, a function by its name."""
    if isinstance(value, Trained | Path):
        return str(value.path if isinstance(value, Trained) else value)
    return guides.name_of(value) if callable(value) else value
