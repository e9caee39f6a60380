"""Words as conditions."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from trilemma.batch import Condition, Rng
from trilemma.conditioning.base import Conditioner, share
from trilemma.conditioning.pretrained import Pretrained
from trilemma.networks.layers import Embedded
from trilemma.networks.text import TextTransformer
from trilemma.tokenizer import Tokenizer


class Text(Conditioner):
    """Captions by a text encoder: a vector for the whole, and tokens to attend to.

    "Nothing said" is the empty text, so that any other may take its place: a negative one.

    Args:
        dim: width of what the network reads.
        encoder: `networks.text.TextTransformer`, which learns with the model; or
            `conditioning.Pretrained`, which need not.
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
            return self.encoder.read(texts, where)
        with warnings.catch_warnings():
            if self.training:  # that a caption is cut is said of what is asked for, not every step
                warnings.simplefilter("ignore")
            ids, mask = (made.to(where) for made in self.tokenizer(texts, full=True))
        each, whole = self.encoder(ids, mask)
        return each, mask, whole

    def nothing(self, condition: Condition) -> Embedded:
        """Embed the empty text for the images of `condition`."""
        return self(Condition(condition.count))
