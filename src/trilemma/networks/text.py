"""A transformer over words: the text tower of CLIP.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
section 2.4: token and position embeddings, blocks of causal self-attention and a perceptron, and a
last normalisation. The feature of the whole text is that of its end token, which has seen all of
it. Most parameters of a small tower are its token embedding, 49,408 x width; factorised (Lan et al.
2020, "ALBERT", section 3.1) it is 49,408 x `embedding` and a matrix to the width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.networks.layers import TransformerBlock


class TextTransformer(nn.Module):
    """Maps token numbers to features of the text and of each token.

    Args:
        width: of the sequence.
        depth: how many blocks.
        heads: of the attention; they divide the width.
        expand: width of the perceptrons' inner layer, in widths.
        vocabulary: how many tokens there are.
        context: the longest sequence.
        end: number of the end token, whose first place holds the feature of the text.
        embedding: width of the token embedding when it is factorised; None: the width.
        causal: a token sees only those before it; else all that the mask allows.
        activation: gelu, or quick-gelu as in OpenAI's weights.
    """

    def __init__(
        self,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
        expand: float = 4,
        vocabulary: int = 49_408,
        context: int = 77,
        end: int = 49_407,
        embedding: int | None = None,
        causal: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.width, self.context, self.end, self.causal = width, context, end, causal
        self.token = nn.Embedding(vocabulary, embedding or width)
        self.widen = nn.Linear(embedding, width, bias=False) if embedding else None
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, expand, activation, causal, depth) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        if self.widen is not None:
            assert embedding is not None
            nn.init.normal_(self.widen.weight, std=embedding**-0.5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map token numbers (B, T) to the features of tokens (B, T, width) and of texts (B, width).

        Args:
            ids: each row with an end token; `tokenizer.Tokenizer` makes them.
            mask: (B, T), True for tokens that others may look at. With a causal transformer the
                tokens up to the end token are the same without.

        Raises:
            ValueError: the sequences are longer than the context.
        """
        length = ids.shape[1]
        if length > self.context:
            raise ValueError(
                f"texts of {length} tokens were given to a transformer of {self.context}; cut them "
                "to its context"
            )
        x = self.token(ids)
        if self.widen is not None:
            x = self.widen(x)
        x = x + self.position[:length]
        seen = None if mask is None or self.causal else mask[:, None, None]
        for block in self.blocks:
            x = block(x, seen)
        x = self.norm(x)
        end = (ids == self.end).int().argmax(1)
        return x, x[torch.arange(len(x), device=x.device), end]
