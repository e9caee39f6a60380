"""From what is asked of a picture (Condition) to what a network reads (Embedded).

With a probability `dropout` a training image's condition is replaced by "nothing said", so that
one network learns the conditional and the unconditional distribution: Ho & Salimans 2021,
"Classifier-Free Diffusion Guidance", algorithm 1.

- Labels: a learned vector for each class, joined to the time (Dhariwal & Nichol 2021).
- LabelChannels: labels as constant channels beside the picture (Mirza & Osindero 2014).
- Attributes: a linear map of several yes or no.
- Source: another picture beside the noisy one, as channels: a small one for super-resolution
  (Saharia et al. 2022, "Image Super-Resolution via Iterative Refinement"), a grey one for
  colourisation, one with a hole for inpainting (Saharia et al. 2022, "Palette").
- Text: captions, by a transformer that learns with the model, or a pretrained one held still; as
  tokens to attend to (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion
  Models", section 3.3), and as a vector joined to the time (Podell et al. 2023, "SDXL", 2.1).
- Together: several of these.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Condition, Rng, to_float, to_uint8
from trilemma.errors import UserError
from trilemma.networks.layers import Embedded, check_shape
from trilemma.networks.text import TextTransformer
from trilemma.tokenizer import Tokenizer


class Conditioner(nn.Module, ABC):
    """A map from conditions to what networks read.

    Attributes:
        guidable: whether "nothing said" is learned, without which there is no guidance.
        classes: how many it knows; 0 if it reads no labels.
    """

    guidable: bool
    classes: int = 0

    @abstractmethod
    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed a condition.

        Args:
            condition: of B images.
            rng: in training: some of the condition is dropped.
            image: in training: the pictures (B, C, H, W) themselves, for what is made of them.

        Raises:
            ValueError: what the model must be told is not said, or is not of its kind.
        """

    @abstractmethod
    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`, but for a source, which stays."""


class Labels(Conditioner):
    """Class labels by a learned vector each, and one more for "nothing said".

    Args:
        classes: number of classes; 0 for data without labels.
        dim: width of the vectors.
        dropout: probability of "nothing said" in training; guidance needs some.
    """

    def __init__(self, classes: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.classes, self.dropout = classes, _share(dropout)
        self.guidable = bool(classes and dropout)
        self.table = nn.Embedding(classes + 1, dim) if classes else None
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=0.02)

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed labels: `vector` (B, dim)."""
        if self.table is None:
            return Embedded()
        where = self.table.weight.device
        return Embedded(vector=self.table(_told(condition, self.classes, self.dropout, rng, where)))

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`."""
        return self(Condition(condition.count))


class LabelChannels(Conditioner):
    """Class labels as channels of ones and zeros; all zeros for "nothing said".

    Args:
        classes: number of classes; 0 for data without labels.
        size: height and width of what the network reads.
        dropout: probability of "nothing said" in training; guidance needs some.
    """

    def __init__(self, classes: int, size: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.classes, self.size, self.dropout = classes, size, _share(dropout)
        self.guidable = bool(classes and dropout)
        self.register_buffer("place", torch.zeros(0), persistent=False)  # knows the device

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed labels: `image` (B, classes, size, size)."""
        if not self.classes:
            return Embedded()
        where = cast(Tensor, self.place).device
        told = _told(condition, self.classes, self.dropout, rng, where)
        rows = F.one_hot(told, self.classes + 1)[:, :-1].float()
        return Embedded(image=rows[:, :, None, None].expand(-1, -1, self.size, self.size))

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`."""
        return self(Condition(condition.count))


class Attributes(Conditioner):
    """Attributes by a linear map of 1 (it has it), -1 (it has not) and 0 ("nothing said").

    Args:
        attributes: how many; 0 for data without.
        dim: width of the vector.
        dropout: probability of "nothing said" in training; guidance needs some.
    """

    def __init__(self, attributes: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attributes, self.dropout = attributes, _share(dropout)
        self.guidable = bool(attributes and dropout)
        self.map = nn.Linear(attributes, dim) if attributes else None
        if self.map is not None:
            nn.init.normal_(self.map.weight, std=0.02)

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed attributes (B, A) of 0 and 1: `vector` (B, dim)."""
        if self.map is None:
            return Embedded()
        if condition.attributes is None:
            if not self.dropout:
                raise ValueError(
                    "no attributes were given, and the model was trained with dropout 0, never "
                    "without; say them, or train with conditioner.dropout above 0"
                )
            weight = self.map.weight
            return Embedded(vector=self.map(weight.new_zeros(condition.count, self.attributes)))
        check_shape("attributes", condition.attributes, self.attributes)
        signs = 2 * condition.attributes - 1
        if rng is not None and self.dropout:
            signs = torch.where((rng.uniform() < self.dropout)[:, None], 0, signs)
        return Embedded(vector=self.map(signs))

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`."""
        return self(Condition(condition.count))


class Pretrained(nn.Module):
    """A pretrained text encoder from a folder, held still, through `transformers`.

    Its weights stay in the folder: a checkpoint names it, and needs it again. What it makes of a
    text is kept, for captions come back every epoch.

    Args:
        path: a folder of a sentence encoder (BERT-like) or of CLIP, `config.json`, weights in
            safetensors and tokenizer inside.
        context: tokens read of a text; longer ones are cut.
        kept: texts whose features are kept.
    """

    def __init__(self, path: str, context: int = 32, kept: int = 20_000) -> None:
        super().__init__()
        self.path, self.context, self.kept = path, context, kept
        self._read, self.width = _pretrained(path)
        self._known: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def forward(self, texts: list[str], where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of tokens (B, T, W), their mask (B, T), and of texts (B, W)."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            if len(self._known) + len(new) > self.kept:
                self._known.clear()
                new = list(dict.fromkeys(texts))
            made = self._read(new, self.context)
            self._known |= dict(zip(new, zip(*made, strict=True), strict=True))
        each, mask, whole = zip(*(self._known[text] for text in texts), strict=True)
        return _stacked(each, where), _stacked(mask, where), _stacked(whole, where)


class Text(Conditioner):
    """Captions by a text encoder: a vector for the whole, and tokens to attend to.

    "Nothing said" is the empty text, so that any other may take its place: a negative one.

    Args:
        dim: width of what the network reads.
        encoder: `networks.text.TextTransformer`, which learns with the model; or
            `conditioning.Pretrained`, which is held still.
        dropout: probability of "nothing said" in training; guidance needs some.
        tokens: whether the network attends to tokens; else it gets the vector alone.
    """

    def __init__(
        self,
        dim: int,
        encoder: TextTransformer | Pretrained,
        dropout: float = 0.1,
        tokens: bool = True,
    ) -> None:
        super().__init__()
        self.encoder, self.dropout, self.guidable = encoder, _share(dropout), dropout > 0
        self.tokenizer = Tokenizer(encoder.context)
        self.whole = nn.Linear(encoder.width, dim)
        self.each = nn.Linear(encoder.width, dim) if tokens else None
        nn.init.normal_(self.whole.weight, std=0.02)

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed texts: `vector` (B, dim), and `tokens` (B, T, dim) with their `mask` (B, T)."""
        texts = condition.text
        if texts is None:
            if not self.dropout:
                raise ValueError(
                    "no text was given, and the model was trained with dropout 0, never without; "
                    "say one, or train with conditioner.dropout above 0"
                )
            texts = [""] * condition.count
        if len(texts) != condition.count:
            raise ValueError(f"{len(texts)} texts were given for {condition.count} pictures")
        if rng is not None and self.dropout:
            left = (rng.uniform() < self.dropout).tolist()
            texts = ["" if out else text for text, out in zip(texts, left, strict=True)]
        each, mask, whole = self._encode(texts)
        if self.each is None:
            return Embedded(vector=self.whole(whole))
        return Embedded(vector=self.whole(whole), tokens=self.each(each), mask=mask)

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of tokens (B, T, W), their mask (B, T), and features of texts (B, W)."""
        where = self.whole.weight.device
        if isinstance(self.encoder, Pretrained):
            return self.encoder(texts, where)
        with warnings.catch_warnings():
            if self.training:  # that a caption is cut is said of what is asked for, not every step
                warnings.simplefilter("ignore")
            ids, mask = (made.to(where) for made in self.tokenizer(texts, full=True))
        each, whole = self.encoder(ids, mask)
        return each, mask, whole

    def nothing(self, condition: Condition) -> Embedded:
        """Embed the empty text for the images of `condition`."""
        return self(Condition(condition.count))


class Source(Conditioner):
    """A picture to draw from, as channels beside the noisy one.

    In training it is made of the training picture. It is never dropped: guidance is by what else
    is said.

    Args:
        kind: what the source is. "small": the picture shrunk by `factor`; "grey": its luma;
            "masked": the picture with a part hidden (0), and a channel of 1 there, 0 elsewhere.
        shape: (C, H, W) of the pictures.
        factor: how much smaller the small one is.
    """

    guidable = False

    def __init__(self, kind: str, shape: Sequence[int], factor: int = 4) -> None:
        super().__init__()
        channels, height, width = shape
        if kind not in SOURCES:
            raise ValueError(f"source '{kind}' is not known; expected one of {', '.join(SOURCES)}")
        if kind == "grey" and channels == 1:
            raise ValueError("the pictures are grey, and so have no colours to learn")
        if kind == "small" and (height % factor or width % factor):
            raise ValueError(
                f"pictures of {height} x {width} cannot be shrunk by {factor}; both sides must be "
                "multiples of it: choose another --size, or conditioner.factor"
            )
        self.kind, self.factor, self.size = kind, factor, (height, width)
        self.shape = {
            "small": (channels, height // factor, width // factor),
            "grey": (1, height, width),
            "masked": (channels + 1, height, width),
        }[kind]
        """(C, h, w) of a source."""

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed a source (B, C, h, w): `image` (B, C, H, W), enlarged where it is small."""
        source = condition.source
        if image is not None and rng is not None:
            source = SOURCES[self.kind](image, rng, self.factor)
        if source is None:
            raise ValueError(
                f"this model draws from a given picture ({self.kind}): it needs condition.source; "
                "with trilemma edit repair"
            )
        check_shape("sources", source, *self.shape)
        if source.shape[2:] != self.size:
            source = F.interpolate(source.float(), self.size, mode="bicubic").clamp(-1, 1)
        return Embedded(image=source)

    def nothing(self, condition: Condition) -> Embedded:
        """Embed the source all the same: without it the model draws nothing."""
        return self(condition)


class Together(Conditioner):
    """Several conditioners: vectors are added, tokens and channels put one after the other.

    Each is dropped by itself.

    Args:
        parts: the conditioners.
    """

    def __init__(self, parts: Sequence[Conditioner]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.guidable = any(part.guidable for part in parts)
        self.classes = max((part.classes for part in parts), default=0)

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed what each part reads."""
        return _merged([part(condition, rng, image) for part in self.parts])

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" to each part."""
        return _merged([cast(Conditioner, part).nothing(condition) for part in self.parts])


def text_of(model: nn.Module) -> Text | None:
    """Return what of a model reads texts, if anything."""
    return next((part for part in model.modules() if isinstance(part, Text)), None)


def source_of(conditioner: nn.Module) -> Source | None:
    """Return the source that a conditioner reads, if any."""
    return next((part for part in conditioner.modules() if isinstance(part, Source)), None)


def shrink(image: Tensor, factor: int) -> Tensor:
    """Return the low resolution (B, C, H/factor, W/factor) of images (B, C, H, W) in [-1, 1].

    Bicubic with antialiasing, a = -1/2 (Keys 1981), then rounded to 8 bits as a file would be.
    Raises ValueError when a side is no multiple of the factor.
    """
    height, width = image.shape[2:]
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be shrunk by {factor}; both sides must be "
            "multiples of it"
        )
    size = (height // factor, width // factor)
    return to_float(to_uint8(F.interpolate(image.float(), size, mode="bicubic", antialias=True)))


def grey(image: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W) of RGB images in [-1, 1] by BT.601, rounded to 8 bits."""
    weights = image.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return to_float(to_uint8((image * weights).sum(1, keepdim=True)))


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """Return images (B, C, H, W), 0 where mask (B, 1, H, W) is 1, and the mask, as one tensor."""
    mask = mask.to(image.dtype)
    return torch.cat([image * (1 - mask), mask], dim=1)


def random_masks(rng: Rng, height: int, width: int) -> Tensor:
    """Draw masks (B, 1, H, W), 1 where the picture is to be hidden.

    One to three rectangles of a fifth to four fifths of each side, their centres anywhere; of every
    fourth mask the complement, so that a part is kept and all around it is to be painted.
    """
    drawn = rng.uniform(3, 5)[..., None, None]  # (B, 3, 5, 1, 1)
    y = ((torch.arange(height, device=rng.device) + 0.5) / height)[:, None]
    x = ((torch.arange(width, device=rng.device) + 0.5) / width)[None, :]
    centre_y, centre_x = drawn[:, :, 0], drawn[:, :, 1]  # (B, 3, 1, 1)
    half_y, half_x = 0.1 + 0.3 * drawn[:, :, 2], 0.1 + 0.3 * drawn[:, :, 3]
    inside = ((y - centre_y).abs() < half_y) & ((x - centre_x).abs() < half_x)  # (B, 3, H, W)
    inside[:, 1:] &= drawn[:, 1:, 4] < 0.5
    hidden = inside.any(1, keepdim=True)
    return (hidden ^ (drawn[:, :1, 4] < 0.25)).float()


SOURCES: dict[str, Callable[[Tensor, Rng, int], Tensor]] = {
    "small": lambda image, rng, factor: shrink(image, factor),
    "grey": lambda image, rng, factor: grey(image),
    "masked": lambda image, rng, factor: masked(image, random_masks(rng, *image.shape[2:])),
}
"""Kind -> (images (B, C, H, W), rng, factor) -> sources."""


def _share(dropout: float) -> float:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected 0 or more and less than 1")
    return dropout


def _told(
    condition: Condition, classes: int, dropout: float, rng: Rng | None, where: torch.device
) -> Tensor:
    """Return (B,) class indices, `classes` where nothing is said or, with `rng`, it is dropped.

    Raises:
        ValueError: a label is not one of the classes, or there is none and there must be.
    """
    label = condition.label
    if label is None:
        if not dropout:
            raise ValueError(
                "no labels were given, and the model was trained with dropout 0, never "
                "without labels; say a label, or train with conditioner.dropout above 0"
            )
        label = torch.full((condition.count,), classes, device=where)
    elif label.numel() and not (0 <= int(label.min()) <= int(label.max()) < classes):
        raise ValueError(
            f"labels from {int(label.min())} to {int(label.max())} were given; "
            f"the model knows 0 to {classes - 1}"
        )
    if rng is not None and dropout:
        label = torch.where(rng.uniform() < dropout, classes, label)
    return label


def _stacked(parts: Sequence[Tensor], where: torch.device) -> Tensor:
    return torch.stack(tuple(parts)).to(where)


@cache
def _pretrained(path: str) -> tuple[Callable[[list[str], int], tuple[Tensor, ...]], int]:
    """Return what reads texts with the encoder in a folder, and its width.

    Raises:
        UserError: `transformers` is missing, or the folder holds no such encoder.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            'a pretrained text encoder needs transformers: pip install "trilemma[text]"'
        ) from None
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} holds no config.json; expected the folder of a text encoder")
    given: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        clip = kind in ("clip", "clip_text_model")
        cls = transformers.CLIPTextModel if clip else transformers.AutoModel
        model = cls.from_pretrained(folder, **given).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no text encoder that can be read: {error}") from error

    def read(texts: list[str], context: int) -> tuple[Tensor, ...]:
        told = tokenizer(
            texts, padding="max_length", truncation=True, max_length=context, return_tensors="pt"
        )
        with torch.autocast("cpu", enabled=False):
            made = model(input_ids=told["input_ids"], attention_mask=told["attention_mask"])
        each, mask = made.last_hidden_state, told["attention_mask"].bool()
        seen = mask[:, :, None].to(each.dtype)
        whole = made.pooler_output if clip else (each * seen).sum(1) / seen.sum(1)
        return each, mask, whole

    return read, model.config.hidden_size


def _merged(parts: list[Embedded]) -> Embedded:
    vectors = [part.vector for part in parts if part.vector is not None]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    masks = [
        part.tokens.new_ones(part.tokens.shape[:2], dtype=torch.bool)
        if part.mask is None
        else part.mask
        for part in parts
        if part.tokens is not None
    ]
    images = [part.image for part in parts if part.image is not None]
    return Embedded(
        vector=sum(vectors[1:], vectors[0]) if vectors else None,
        tokens=torch.cat(tokens, 1) if tokens else None,
        mask=torch.cat(masks, 1) if masks else None,
        image=torch.cat(images, 1) if images else None,
    )
