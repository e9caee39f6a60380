"""Words as conditions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.batch import Condition, Rng
from trilemma.conditioning.base import Conditioner, share
from trilemma.errors import UserError
from trilemma.networks.layers import Embedded
from trilemma.networks.text import TextTransformer
from trilemma.tokenizer import Tokenizer


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
        self.encoder, self.dropout, self.guidable = encoder, share(dropout), dropout > 0
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
