"""How near a restored picture is to its original, PSNR and SSIM; and how noisy a picture is.

    PSNR    10 log10(255^2 / mean (a - b)^2), in decibels; infinite for equal pictures

    SSIM    mean over windows of (2 m_a m_b + C1) (2 s_ab + C2)
                                 / ((m_a^2 + m_b^2 + C1) (s_a^2 + s_b^2 + C2))

Wang, Bovik, Sheikh, Simoncelli (2004), "Image Quality Assessment: From Error Visibility to
Structural Similarity", equation 13: means m, variances s^2 and covariance s_ab weighted by an 11x11
Gaussian of deviation 1.5, C1 = (0.01 255)^2, C2 = (0.03 255)^2, over all windows that lie within
the picture.

The protocol of super-resolution papers measures luma alone, Y of ITU-R BT.601 in [16, 235], not
rounded, and leaves out a border as wide as the factor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, DEVIATION = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def luma(image: Tensor) -> Tensor:
    """Return Y (B, 1, H, W) in [16, 235], float64, of images (B, 1 or 3, H, W) in [0, 255]."""
    weight = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=image.device)
    rgb = image.double().expand(-1, 3, -1, -1) / 255
    return 16 + torch.einsum("bchw,c->bhw", rgb, weight)[:, None]


def psnr(a: Tensor, b: Tensor, border: int = 0) -> Tensor:
    """Return the PSNR (B,) in decibels of images (B, C, H, W) in [0, 255].

    `border` pixels are left out on each side. Raises ValueError when the shapes differ or nothing
    is left.
    """
    a, b = _inside(a, b, border, 1)
    return 10 * torch.log10(255**2 / (a - b).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor, border: int = 0) -> Tensor:
    """Return the SSIM (B,) of images (B, C, H, W) in [0, 255], a mean over channels and windows.

    `border` as in `psnr`. Raises ValueError when the shapes differ or no window fits.
    """
    a, b = _inside(a, b, border, WINDOW)
    mean_a, mean_b = _window(a), _window(b)
    variance_a = _window(a * a) - mean_a**2
    variance_b = _window(b * b) - mean_b**2
    covariance = _window(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    whole = (mean_a**2 + mean_b**2 + C1) * (variance_a + variance_b + C2)
    return (alike / whole).flatten(1).mean(1)


def noise_deviation(image: Tensor) -> Tensor:
    """Estimate the deviation (B,) of Gaussian noise in images (B, C, H, W), on their own scale.

    From the finest diagonal details d = (a - b - c + d) / 2 of 2 x 2 pixels, which have the noise's
    deviation and little of most pictures: median |d| / 0.6745 (Donoho, Johnstone 1994, "Ideal
    Spatial Adaptation by Wavelet Shrinkage", section 4.2).
    """
    even, odd = image[..., ::2, :], image[..., 1::2, :]
    rows = even[..., : odd.shape[-2], :].float() - odd.float()
    left, right = rows[..., ::2], rows[..., 1::2]
    detail = (left[..., : right.shape[-1]] - right) / 2
    return detail.abs().flatten(1).median(1).values / 0.6745


def _inside(a: Tensor, b: Tensor, border: int, least: int) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"images of {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    height, width = (side - 2 * border for side in a.shape[2:])
    if min(height, width) < least:
        raise ValueError(
            f"{a.shape[2]} x {a.shape[3]} pixels less a border of {border} are too few: at least "
            f"{least} x {least} must be left"
        )
    part = (..., slice(border, border + height), slice(border, border + width))
    return a[part].double(), b[part].double()


def _window(x: Tensor) -> Tensor:
    """Weigh x (B, C, H, W) by the Gaussian window: (B, C, H - 10, W - 10)."""
    place = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    line = torch.exp(-place.square() / (2 * DEVIATION**2))
    line = line / line.sum()
    flat = x.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    return flat.view(*x.shape[:2], *flat.shape[2:])
