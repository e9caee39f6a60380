"""What a trained CLIP says of words and of pictures, as conditions: for `models.unclip`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.batch import Condition, Rng
from trilemma.conditioning.base import Conditioner, share
from trilemma.conditioning.text import Text
from trilemma.model import Frozen, matching
from trilemma.networks.layers import Embedded, check_shape


class ClipText(Conditioner):
    """Words as CLIP's text tower sees them: its tokens and the text's embedding.

    Padded tokens, and all that is dropped, are learned vectors.

    Args:
        clip: a trained CLIP; in a recipe `{ type = "trained", path = "runs/clip" }`.
        dropout: probability of "nothing said" in training; guidance needs some.

    Attributes:
        words: (T, W) of the tokens.
        dim: of the embeddings.
    """

    def __init__(self, clip: Frozen, dropout: float = 0.1) -> None:
        super().__init__()
        self.clip, self.dropout = clip, share(dropout)
        self.guidable = dropout > 0
        model = matching(clip)
        self.words, self.dim = model.words, model.dim
        self.padding = nn.Parameter(torch.randn(self.words[1]) * 0.02)
        if self.guidable:
            self.no_words = nn.Parameter(torch.randn(*self.words) * 0.02)
            self.no_text = nn.Parameter(torch.randn(self.dim) * 0.02)

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed texts: `tokens` (B, T, W) and `vector` (B, dim), sqrt(dim) times the embedding.

        Raises:
            ValueError: there are no texts.
        """
        if condition.text is None:
            raise ValueError("the model draws of words: it needs condition.text")
        with torch.no_grad():
            tokens, mask, z = matching(self.clip).read(condition.text)
        tokens = torch.where(mask[..., None], tokens.float(), self.padding)
        vector = z.float() * self.dim**0.5
        if rng is not None and self.dropout:
            drop = (rng.uniform() < self.dropout)[:, None]
            tokens = torch.where(drop[..., None], self.no_words, tokens)
            vector = torch.where(drop, self.no_text, vector)
        return Embedded(vector=vector, tokens=tokens)

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`; ValueError if it never was."""
        if not self.guidable:
            raise ValueError("the model was trained with dropout 0: it always needs a text")
        return Embedded(
            vector=self.no_text.expand(condition.count, -1),
            tokens=self.no_words.expand(condition.count, -1, -1),
        )


class ClipImage(Conditioner):
    """CLIP's embedding of a picture: added to the time, and as a few tokens to attend to.

    In training it is the embedding of the training picture itself. Ramesh et al. 2022, section 2.1:
    added to the time embedding, and projected into four further tokens of context.

    Args:
        clip: a trained CLIP; in a recipe `{ type = "trained", path = "runs/clip" }`.
        dim: width of vector and tokens.
        tokens: how many; 0 for networks that attend to none.
        dropout: probability of "nothing said" in training; guidance needs some.
    """

    def __init__(self, clip: Frozen, dim: int, tokens: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.clip, self.tokens, self.dropout = clip, tokens, share(dropout)
        self.guidable = dropout > 0
        self.dim = matching(clip).dim
        self.map = nn.Linear(self.dim, (1 + tokens) * dim)
        self.none = nn.Parameter(torch.zeros((1 + tokens) * dim))

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed unit embeddings (B, D): `vector` (B, dim), and `tokens` (B, tokens, dim).

        Raises:
            ValueError: there is no embedding, or one of another length.
        """
        z = condition.embedding
        if image is not None and rng is not None:
            with torch.no_grad():
                z = matching(self.clip).embed_images(image)
        if z is None:
            return self.nothing(condition)
        check_shape("embeddings", z, self.dim)
        made = self.map(z.float() * self.dim**0.5)
        if rng is not None and self.dropout:
            made = torch.where((rng.uniform() < self.dropout)[:, None], self.none, made)
        return self._parts(made)

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`."""
        return self._parts(self.none.expand(condition.count, -1))

    def _parts(self, made: Tensor) -> Embedded:
        vector, *tokens = made.unflatten(1, (1 + self.tokens, -1)).unbind(1)
        return Embedded(vector=vector, tokens=torch.stack(tokens, 1) if tokens else None)


def reads_text(model: nn.Module) -> bool:
    """Whether anything of a model reads texts."""
    return any(isinstance(part, Text | ClipText) for part in model.modules())
