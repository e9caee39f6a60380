"""The transformer of DALL-E 2's diffusion prior: from words and noise to an image's embedding.

Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents", section 2.2:
a decoder-only transformer with a causal mask over, in this order, the encoded words, the text's
embedding, the time, the noised image embedding, and a learned query, whose output is the image
embedding without its noise. It predicts that embedding itself: the target is `image`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.networks.layers import Embedded, TimeEmbedding, check_shape
from trilemma.networks.transformer import CausalTransformer


class Prior(nn.Module):
    """Maps a noised embedding, a time and words to an embedding.

    Args:
        dim: of the embeddings.
        words: (T, D) of the encoded words.
        width: of the transformer.
        layers: of the transformer.
        heads: of its attention; width must be a multiple of 4 heads.
    """

    def __init__(
        self, dim: int, words: tuple[int, int], width: int = 256, layers: int = 6, heads: int = 4
    ) -> None:
        super().__init__()
        self.dim, self.words = dim, tuple(words)
        self.word = nn.Linear(words[1], width)
        self.text, self.noised = nn.Linear(dim, width), nn.Linear(dim, width)
        self.time = TimeEmbedding(width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.kinds = nn.Parameter(torch.randn(words[0] + 4, width) * 0.02)  # learned positions
        self.transformer = CausalTransformer(width, layers, heads)
        self.out = nn.Linear(width, dim)

    def forward(self, x: Tensor, time: Tensor, embedded: Embedded) -> Tensor:
        """Map noised embeddings (B, dim) at times (B,) to embeddings (B, dim).

        Args:
            x: the noised embeddings.
            time: of the noise, in [0, 1].
            embedded: `tokens` (B, T, D), the encoded words, and `vector` (B, dim), the text's
                embedding.

        Raises:
            ValueError: no words were given, or of another shape.
        """
        if embedded.tokens is None or embedded.vector is None:
            raise ValueError("the prior draws embeddings of words: it needs tokens and a vector")
        check_shape("encoded words", embedded.tokens, *self.words)
        single = [self.text(embedded.vector), self.time(time), self.noised(x)]
        last = torch.stack([*single, self.query.expand_as(single[0])], dim=1)
        sequence = torch.cat([self.word(embedded.tokens), last], dim=1) + self.kinds
        place = torch.zeros(sequence.shape[1], 2, device=x.device)
        place[:, 0] = torch.arange(sequence.shape[1], device=x.device)
        return self.out(self.transformer(sequence, place)[:, -1])
