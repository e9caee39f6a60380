"""A critic of patches: one score for every place of an image, each from a patch around it.

Isola, Zhu, Zhou, Efros (2017), "Image-to-Image Translation with Conditional Adversarial Networks",
section 3.2.2 and appendix 6.1.2: 4x4 convolutions with LeakyReLU(0.2), the first `depth` of stride
2, two more of stride 1; channels double up to eight times the first. The side of the patch is the
receptive field of one score:

    depth    1    2    3     4
    patch   16   34   70   142        r <- stride r + 4 - stride, from the last layer to the first

Instance normalisation in every layer but the first and the last (Zhu et al. 2017, "Unpaired
Image-to-Image Translation using Cycle-Consistent Adversarial Networks", appendix 7.2), so a score
does not depend on the other images of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from trilemma.networks.layers import GroupNorm


class Critic(nn.Module):
    """Maps images to maps of scores: how real each patch looks.

    Args:
        shape: (C, H, W) of the images.
        channels: width of the first layer.
        depth: layers of stride 2; the default is the 70x70 critic of the paper, for 256 pixels.
    """

    def __init__(self, shape: Sequence[int], channels: int = 64, depth: int = 3) -> None:
        super().__init__()
        image_channels, height, width = shape
        if depth < 1:
            raise ValueError(f"depth is {depth}; a critic of patches has 1 or more")
        if min(height, width) < 3 * 2**depth:
            raise ValueError(
                f"a critic of depth {depth} needs images of {3 * 2**depth} pixels or more, and "
                f"these are {height} x {width}: make it less deep (--set ...depth={depth - 1})"
            )
        layers: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = channels
        for i in range(1, depth + 1):
            after = channels * min(2**i, 8)
            stride = 2 if i < depth else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                GroupNorm(after, groups=after, eps=1e-5),
                nn.LeakyReLU(0.2),
            ]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to scores (B, 1, h, w), h = H // 2^depth - 2, in float32."""
        return self.layers(image).float()
