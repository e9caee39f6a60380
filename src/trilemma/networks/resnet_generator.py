"""The generator of CycleGAN: an image of one domain in, the same scene in another domain out.

Johnson, Alahi, Fei-Fei (2016), "Perceptual Losses for Real-Time Style Transfer and
Super-Resolution", as Zhu, Park, Isola, Efros (2017), "Unpaired Image-to-Image Translation using
Cycle-Consistent Adversarial Networks", appendix 7.2, take it up: a 7x7 convolution, two halvings
that double the channels, residual blocks at a quarter of the side, two doublings, a 7x7 convolution
and tanh. Reflected borders in place of zeros, which would show as a frame; ReLU; weights drawn from
N(0, 0.02). The doublings repeat pixels before a convolution, where the paper has transposed
convolutions, whose uneven overlap draws a checkerboard: Odena, Dumoulin, Olah (2016),
"Deconvolution and Checkerboard Artifacts".

Instance normalisation with a gain and a bias: Ulyanov, Vedaldi, Lempitsky (2016), "Instance
Normalization: The Missing Ingredient for Fast Stylization", equation 3, is group normalisation
whose groups are single channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from trilemma.networks.layers import GroupNorm


def _normalised(convolution: nn.Module, channels: int) -> list[nn.Module]:
    """Return a convolution to `channels` with the instance normalisation that follows it."""
    return [convolution, GroupNorm(channels, groups=channels, eps=1e-5)]


class Residual(nn.Module):
    """x + F(x), F two 3x3 convolutions; without a ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for last in (False, True):
            conv = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=False)
            layers += _normalised(conv, channels) + ([] if last else [nn.ReLU()])
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x + self.layers(x)


class Generator(nn.Module):
    """Maps images to images of the same shape.

    Args:
        shape: (C, H, W) of the images; H and W multiples of 4, at least 8.
        channels: width beside the images; the paper's is 64.
        blocks: residual blocks; None takes the paper's 6 for sides up to 128 pixels, 9 above.
        skip: draw a change of the image, none at first, rather than all of it anew; for domains
            that are alike pixel by pixel. Not of the paper.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 64,
        blocks: int | None = None,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.skip = skip
        image_channels, height, width = shape
        if height % 4 or width % 4 or min(height, width) < 8:
            raise ValueError(f"sides of {height} x {width} pixels: expected multiples of 4 from 8")
        if blocks is None:
            blocks = 6 if max(height, width) <= 128 else 9
        first = nn.Conv2d(
            image_channels, channels, 7, padding=3, padding_mode="reflect", bias=False
        )
        layers = [*_normalised(first, channels), nn.ReLU()]
        for wide in (2 * channels, 4 * channels):
            down = nn.Conv2d(wide // 2, wide, 3, 2, padding=1, bias=False)
            layers += [*_normalised(down, wide), nn.ReLU()]
        layers += [Residual(4 * channels) for _ in range(blocks)]
        for wide in (2 * channels, channels):
            up = nn.Conv2d(2 * wide, wide, 3, padding=1, padding_mode="reflect", bias=False)
            layers += [nn.Upsample(scale_factor=2), *_normalised(up, wide), nn.ReLU()]
        last = nn.Conv2d(channels, image_channels, 7, padding=3, padding_mode="reflect")
        self.layers = nn.Sequential(*layers, last)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        if skip:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to images (B, C, H, W) in [-1, 1], in float32."""
        change = self.layers(image).float()
        # tanh undoes atanh; black and white would be at infinity: clamped, they lose 1.3 levels
        return (change + image.float().clamp(-0.99, 0.99).atanh() if self.skip else change).tanh()
