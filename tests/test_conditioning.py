"""From conditions to what networks read."""

import pytest
import torch

from trilemma.batch import Batch, Condition, Rng, to_float, to_uint8
from trilemma.codecs import Pixels
from trilemma.conditioning import (
    Attributes,
    LabelChannels,
    Labels,
    Source,
    Together,
    random_masks,
    shrink,
    source_of,
)
from trilemma.models.diffusion import Diffusion
from trilemma.networks.quick_unet import QuickUNet

N = 2000
LABEL = torch.arange(N) % 3


def test_label_channels_are_one_hot_or_nothing():
    channels = LabelChannels(3, 4, dropout=0.25)
    image = channels(Condition(N, LABEL)).image
    assert image.shape == (N, 3, 4, 4)
    assert torch.equal(image[:, :, 1, 2], torch.eye(3)[LABEL])
    assert not channels.nothing(Condition(2)).image.any()
    dropped = (channels(Condition(N, LABEL), Rng(range(N))).image.sum((1, 2, 3)) == 0).float()
    assert dropped.mean().item() == pytest.approx(0.25, abs=0.03)
    assert channels.guidable and not LabelChannels(0, 4).guidable
    assert LabelChannels(0, 4)(Condition(2)).image is None
    with pytest.raises(ValueError, match="knows 0 to 2"):
        channels(Condition(1, torch.tensor([3])))
    with pytest.raises(ValueError, match="dropout 0"):
        LabelChannels(3, 4, dropout=0.0)(Condition(1))


def test_attributes_are_signs_and_nothing_is_zero():
    torch.manual_seed(0)
    part = Attributes(2, 8, dropout=0.25)
    bits = torch.tensor([[1.0, 0.0]])
    told = part(Condition(1, attributes=bits)).vector
    torch.testing.assert_close(told, part.map(torch.tensor([[1.0, -1.0]])))
    nothing = part.nothing(Condition(1, attributes=bits)).vector
    torch.testing.assert_close(nothing[0], part.map.bias)
    drawn = part(Condition(N, attributes=bits.expand(N, 2)), Rng(range(N))).vector
    share = (drawn == part.map.bias).all(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)
    assert part.guidable and Attributes(0, 8)(Condition(1)).vector is None
    with pytest.raises(ValueError, match="attributes of shape"):
        part(Condition(1, attributes=torch.ones(1, 3)))
    with pytest.raises(ValueError, match="dropout 0"):
        Attributes(2, 8, dropout=0.0)(Condition(1))


def pictures(n=6):
    return to_float(to_uint8(Rng(range(n)).uniform(3, 16, 16) * 2 - 1))


def test_sources_are_made_of_the_training_pictures():
    image, rng = pictures(), Rng(range(6))
    told = Condition(6)
    small = Source("small", (3, 16, 16))
    assert small.shape == (3, 4, 4)
    made = small(told, rng, image).image
    assert made.shape == image.shape
    torch.testing.assert_close(made, small(Condition(6, source=shrink(image, 4))).image)
    grey = Source("grey", (3, 16, 16))(told, rng, image).image
    luma = 0.299 * image[:, 0] + 0.587 * image[:, 1] + 0.114 * image[:, 2]
    assert (grey[:, 0] - luma).abs().max() <= 0.5 / 127.5 + 1e-6
    hole = Source("masked", (3, 16, 16))(told, rng, image).image
    hidden = hole[:, 3:] > 0
    assert torch.equal(hole[:, :3], image * ~hidden) and hidden.any() and not hidden.all()


def test_masks_hide_a_third_or_so_and_depend_on_their_stream_alone():
    masks = random_masks(Rng(range(N)), 16, 16)
    share = masks.mean((1, 2, 3))
    assert masks.unique().tolist() == [0, 1] and 0.2 < share.mean() < 0.6
    assert (share > 0.7).any() and (share < 0.1).any()
    assert torch.equal(random_masks(Rng([7]), 16, 16)[0], masks[7])


def test_a_source_is_needed_and_never_dropped():
    part = Source("grey", (3, 16, 16))
    source = torch.zeros(2, 1, 16, 16)
    assert torch.equal(part.nothing(Condition(2, source=source)).image, source)
    with pytest.raises(ValueError, match="needs condition.source"):
        part(Condition(2))
    with pytest.raises(ValueError, match="sources of shape"):
        part(Condition(2, source=torch.zeros(2, 3, 16, 16)))
    for arguments, message in {
        ("blurred", (3, 16, 16)): "small, grey, masked",
        ("grey", (1, 16, 16)): "no colours",
        ("small", (3, 18, 18)): "multiples",
    }.items():
        with pytest.raises(ValueError, match=message):
            Source(*arguments)


def test_together_adds_vectors_and_joins_channels():
    torch.manual_seed(0)
    labels, bits = Labels(3, 8), Attributes(2, 8)
    parts = [labels, bits, LabelChannels(3, 16), Source("grey", (3, 16, 16))]
    both = Together(parts)
    told = Condition(
        2, torch.tensor([0, 2]), torch.ones(2, 2), source=torch.full((2, 1, 16, 16), 0.5)
    )
    made = both(told)
    torch.testing.assert_close(made.vector, labels(told).vector + bits(told).vector)
    assert made.image.shape == (2, 4, 16, 16) and made.tokens is None
    nothing = both.nothing(told)
    assert not nothing.image[:, :3].any() and (nothing.image[:, 3] == 0.5).all()
    assert both.classes == 3 and parts[3].classes == 0
    assert both.guidable and not Together([Source("grey", (3, 16, 16)), Labels(0, 8)]).guidable
    assert source_of(both) is parts[3] and source_of(labels) is None


def test_a_model_of_a_source_learns_samples_and_is_guided_by_its_label():
    torch.manual_seed(0)
    shape = (3, 16, 16)
    conditioner = Together([Labels(3, 32), Source("small", shape)])
    network = QuickUNet(6, 3, 16, [16, 24], [1, 1], 32)
    model = Diffusion(Pixels(shape), network, conditioner)
    image = pictures()
    batch = Batch(image, Condition(6, torch.arange(6) % 3), 0, Rng(range(6)))
    whole = model.loss(batch)["loss"]
    batch = Batch(image, batch.condition, 0, Rng(range(6)))
    parts = [model.loss(part)["loss"] for part in batch.split(3)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    told = Condition(6, batch.condition.label, source=shrink(image, 4))
    drawn = model.sample(told, Rng(range(6)), steps=2, guidance=2.0)
    assert drawn.shape == image.shape
    with pytest.raises(ValueError, match="needs condition.source"):
        model.encode(image)
