"""Differentiable augmentation: each image by its own numbers, gradients, special cases."""

import pytest
import torch

from trilemma.batch import Rng
from trilemma.networks.augment import DRAWN, augment

# b, s, c, down, right, top, left: colour and place as they are, the square cut at the upper left.
NEUTRAL = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.01, 0.01])


def changed(image, **numbers):
    drawn = NEUTRAL.expand(len(image), -1).clone()
    names = ("brightness", "saturation", "contrast", "down", "right", "top", "left")
    for name, value in numbers.items():
        drawn[:, names.index(name)] = value
    return augment(image, drawn)


def test_neutral_numbers_change_only_the_square():
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    out = changed(image)
    assert torch.allclose(out[:, :, 4:], image[:, :, 4:], atol=1e-6)
    assert torch.allclose(out[:, :, :, 4:], image[:, :, :, 4:], atol=1e-6)
    assert (out[:, :, :4, :4] == 0).all()


def test_cutout_in_the_middle_is_a_quarter_of_the_image():
    image = torch.ones(1, 1, 16, 16)
    out = changed(image, top=0.5, left=0.5)
    assert (out == 0).sum() == 64
    assert (out[:, :, 4:12, 4:12] == 0).all()


def test_colour():
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    free = (..., slice(4, None))
    assert torch.allclose(changed(image, brightness=0.75)[free], image[free] + 0.25, atol=1e-6)
    grey = changed(image, saturation=0.0)[free]
    assert torch.allclose(grey, image.mean(1, keepdim=True).expand_as(image)[free], atol=1e-6)
    mean = image.mean((1, 2, 3), keepdim=True)
    flat = changed(image, contrast=0.0)[free]
    assert torch.allclose(flat, (0.5 * (image + mean))[free], atol=1e-6)


@pytest.mark.parametrize(("down", "offset"), [(0.001, -2), (0.5, 0), (0.999, 2)])
def test_translation_moves_zeros_in(down, offset):
    image = torch.arange(1.0, 17.0).view(1, 1, 16, 1).expand(1, 1, 16, 16) / 16
    moved = changed(image, down=down)[0, 0, :, 15]
    expected = torch.zeros(16)
    source = torch.arange(16) - offset
    inside = (source >= 0) & (source < 16)
    expected[inside] = image[0, 0, source[inside], 15]
    assert torch.allclose(moved, expected, atol=1e-6)


def test_each_image_has_its_own_change():
    image = torch.rand(1, 3, 16, 16).expand(5, 3, 16, 16)
    together = augment(image, Rng(range(5)).uniform(DRAWN))
    assert len({tuple(one.flatten().tolist()) for one in together}) == 5
    alone = augment(image[:1], Rng([3]).uniform(DRAWN))
    assert torch.allclose(alone[0], together[3], atol=1e-6)


def test_gradients_pass():
    torch.manual_seed(0)
    image = (torch.rand(3, 1, 8, 8, dtype=torch.float32) * 2 - 1).requires_grad_()
    drawn = Rng(range(3)).uniform(DRAWN)
    out = augment(image, drawn)
    direction = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * direction).sum(), image)
    step = torch.randn_like(image)
    moved = (augment(image.detach() + step, drawn) - out.detach()).mul(direction).sum()
    # Affine in the image: a finite difference is exact.
    assert torch.allclose((gradient * step).sum(), moved, rtol=1e-3, atol=1e-3)
