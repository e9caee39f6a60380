"""The Vision Transformer: pictures to features, as the image tower of CLIP.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", with the changes of Radford et al. 2021,
section 2.4: one more normalisation before the blocks, and none of the patches' biases. A picture is
cut into patches, each becomes a token; one more, learned, stands before them, and what becomes of
it is the picture's feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trilemma.networks.layers import TransformerBlock, check_shape


class VisionTransformer(nn.Module):
    """Maps images to one vector each.

    Args:
        shape: (C, H, W) of the images; H and W multiples of `patch`.
        patch: pixels of a token, patch x patch.
        width: of the sequence and of the feature.
        depth: how many blocks.
        heads: of the attention; they divide the width.
        expand: width of the perceptrons' inner layer, in widths.
        activation: gelu, or quick-gelu as in OpenAI's weights.
    """

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 8,
        width: int = 384,
        depth: int = 6,
        heads: int = 6,
        expand: float = 4,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        channels, height, width_pixels = shape
        if height % patch or width_pixels % patch:
            raise ValueError(
                f"images of {height}x{width_pixels} cannot be cut into patches: sizes must be "
                f"multiples of {patch}; choose another --size, or image.patch"
            )
        self.shape, self.patch, self.width = tuple(shape), patch, width
        count = (height // patch) * (width_pixels // patch)
        self.enter = nn.Conv2d(channels, width, patch, patch, bias=False)
        self.first = nn.Parameter(width**-0.5 * torch.randn(width))
        self.position = nn.Parameter(width**-0.5 * torch.randn(1 + count, width))
        self.norm_before = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, expand, activation, depth=depth) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, width)."""
        check_shape("images", image, *self.shape)
        patches = self.enter(image).flatten(2).mT  # (B, N, width)
        first = self.first.to(patches.dtype).expand(len(patches), 1, -1)
        x = self.norm_before(torch.cat([first, patches], dim=1) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])
