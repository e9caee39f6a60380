"""CLIP: pictures and texts in one space, where those that belong together are near.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision". Two
towers map pictures and texts to unit vectors u_i and v_j. Of a batch of N pairs each picture is to
find its text among all, and each text its picture, by softmax over the scaled cosines:

    s_ij = exp(log_scale) u_i . v_j
    loss = 1/2 mean_i -log softmax_j(s_ij)_i  +  1/2 mean_j -log softmax_i(s_ij)_j

The scale is learned and held at 100 at most. Pictures may share a caption; then all that do are
right answers of equal weight, as in Yang et al. 2022, "Unified Contrastive Learning in
Image-Text-Label Space", equation 2. For distinct captions this is the loss above.

More pairs are more wrong answers to tell apart, so batches should be large, and what a tower keeps
for its backward pass is most of the memory. With `chunk` the towers see so many pairs at a time and
keep nothing; the loss is taken over all vectors, and then chunk after chunk is computed once more
for its gradient: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup" (GradCache). Checkpointing a whole tower by chunks does just that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trilemma.batch import Batch
from trilemma.errors import UserError
from trilemma.model import Losses, Model, Phase
from trilemma.tokenizer import Tokenizer

MOST = math.log(100)  # of the scale's logarithm


class Join(nn.Module):
    """From the towers' features to the common space: a matrix each, and the scale of cosines.

    Args:
        image_width: of the image tower's features.
        text_width: of the text tower's features.
        dim: of the common space.
        temperature: one over the scale, at first.
    """

    def __init__(self, image_width: int, text_width: int, dim: int, temperature: float) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, dim, bias=False)
        self.text = nn.Linear(text_width, dim, bias=False)
        for layer, width in ((self.image, image_width), (self.text, text_width)):
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the scaled cosines (N, M) of unit vectors (N, D) and (M, D).

        In float32: bfloat16 would round a cosine times 100 to steps of a half.
        """
        with torch.autocast(image.device.type, enabled=False):
            return self.log_scale.exp() * image.float() @ text.float().mT

    @torch.no_grad()
    def bound(self) -> None:
        """Hold the scale between 1 and 100."""
        self.log_scale.clamp_(0, MOST)


class CLIP(Model):
    """Two towers and the space they meet in.

    Args:
        image: images (B, C, H, W) -> features (B, width), or grids of them (B, latent, h, w), whose
            mean is taken; has `width`, or `latent`.
        text: (token numbers (B, T), mask (B, T)) -> features of tokens and of texts (B, width); has
            `width` and `context`. One that has `tokens` splits texts by that; else CLIP's
            vocabulary does.
        dim: of the common space.
        temperature: one over the scale of the cosines, at first.
        chunk: pairs that the towers see at once in training; None: the whole batch.
        mean: what is subtracted from pictures on [0, 1], one number or one for each channel.
        std: what they are then divided by. The defaults leave them on [-1, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module,
        dim: int = 512,
        temperature: float = 0.07,
        chunk: int | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; expected 1 pair or more, or none")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a number above 0")
        self.image, self.text, self.chunk, self.dim = image, text, chunk, dim
        self.words = (cast(int, text.context), cast(int, text.width))
        image_width = cast(int, getattr(image, "width", None) or getattr(image, "latent", 0))
        self.join = Join(image_width, cast(int, text.width), dim, temperature)
        self.tokens = getattr(text, "tokens", None) or Tokenizer(cast(int, text.context))
        for name, value in (("mean", mean), ("std", std)):
            levels = torch.tensor([value] if isinstance(value, int | float) else list(value))
            self.register_buffer(name, levels[:, None, None], persistent=False)

    def phases(self) -> list[Phase]:
        """One phase."""
        modules = [self.image, self.text, self.join]
        return [Phase("contrast", self.loss, modules, after=self.join.bound)]

    def loss(self, batch: Batch) -> Losses:
        """Let pictures find their texts and texts their pictures among all of the batch.

        Logs the share that does, and the scale.

        Raises:
            UserError: the pictures have no captions.
        """
        texts = batch.condition.text
        if texts is None:
            raise UserError(
                "the pictures have no captions; expected a text in metadata.csv or img.txt beside "
                "img.png, or a template of what is known: --captions 'a picture of {label}'"
            )
        ids, mask = (tensor.to(batch.image.device) for tensor in self.tokens(texts))
        size = self.chunk or len(ids)
        parts = [slice(start, start + size) for start in range(0, len(ids), size)]
        image = self._by_chunks(self.embed_images, [(batch.image[part],) for part in parts])
        text = self._by_chunks(self.embed_tokens, [(ids[part], mask[part]) for part in parts])
        caption = torch.unique(ids, dim=0, return_inverse=True)[1]  # (B,): equal where texts are
        same = caption[:, None] == caption
        return contrast(self.join.similarity(image, text), same) | {
            "scale": self.join.log_scale.exp().detach()
        }

    def _by_chunks(self, tower: Callable[..., Tensor], parts: list[tuple[Tensor, ...]]) -> Tensor:
        """Return what a tower makes of all parts, keeping, of several, only that."""
        if len(parts) == 1:
            return tower(*parts[0])
        return torch.cat([checkpoint(tower, *part, use_reentrant=False) for part in parts])

    def embed_images(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to unit vectors (B, dim) in float32."""
        feature = self.image((image - (2 * self.mean - 1)) / (2 * self.std))
        if feature.ndim == 4:
            feature = feature.mean((2, 3))
        return F.normalize(self.join.image(feature).float(), dim=1)

    def embed_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Map token numbers and their mask (B, T) to unit vectors (B, dim) in float32."""
        return F.normalize(self.join.text(self.text(ids, mask)[1]).float(), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Map B texts to unit vectors (B, dim)."""
        where = self.join.log_scale.device
        return self.embed_tokens(*(tensor.to(where) for tensor in self.tokens(texts)))

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Map B texts to features of tokens (B, T, W), a mask (B, T) and unit vectors (B, dim)."""
        where = self.join.log_scale.device
        ids, mask = (tensor.to(where) for tensor in self.tokens(texts))
        each, whole = self.text(ids, mask)
        short = self.words[0] - each.shape[1]
        vector = F.normalize(self.join.text(whole).float(), dim=1)
        return F.pad(each, (0, 0, 0, short)), F.pad(mask, (0, short)), vector


def contrast(similarity: Tensor, same: Tensor) -> Losses:
    """Return the symmetric contrastive loss of scaled cosines (N, N), and the shares found.

    Args:
        similarity: of picture i and text j, scaled.
        same: (N, N), True where text j is right for picture i; symmetric, its diagonal True.
    """
    right = same / same.sum(1, keepdim=True)
    ways = similarity, similarity.mT
    losses = [F.cross_entropy(scores, right) for scores in ways]
    found = [same.gather(1, scores.argmax(1, keepdim=True)) for scores in ways]
    return {
        "loss": (losses[0] + losses[1]) / 2,
        "texts_found": found[0].float().mean(),
        "pictures_found": found[1].float().mean(),
    }
