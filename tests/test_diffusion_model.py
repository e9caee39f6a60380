"""The Diffusion family: losses, sampling options and their errors."""

import pytest
import torch
from torch import nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.codecs import Pixels
from trilemma.conditioning import Labels
from trilemma.diffusion import schedules, solvers, targets, weights
from trilemma.models.diffusion import Diffusion
from trilemma.networks.layers import Embedded

SHAPE = (1, 4, 4)


class Tiny(nn.Module):
    """A linear map of x, t and the class: enough to tell what is asked of it."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16 + 1 + 8, 16)
        self.calls = []

    def forward(self, x, time, embedded: Embedded):
        self.calls.append(len(x))
        vector = embedded.vector if embedded.vector is not None else x.new_zeros(len(x), 8)
        return self.mix(torch.cat([x.flatten(1), time[:, None], vector], 1)).view_as(x)


def model(classes=3, dropout=0.1, **options):
    torch.manual_seed(0)
    options = {"schedule": schedules.Straight(), "target": "straight", **options}
    return Diffusion(Pixels(SHAPE), Tiny(), Labels(classes, 8, dropout), **options).eval()


def batch(n=12):
    rng = Rng(range(n))
    image = rng.normal(*SHAPE).clamp(-1, 1)
    return Batch(image, Condition(n, label=torch.arange(n) % 3), 0, Rng(range(100, 100 + n)))


@pytest.mark.parametrize("loss", weights.LOSSES)
@pytest.mark.parametrize("target", targets.TARGETS)
def test_loss_does_not_depend_on_how_the_batch_is_split(target, loss):
    m = model(schedule=schedules.Cosine(), target=target, loss=loss, weight=weights.MinSNR())
    whole = m.loss(batch())["loss"]
    parts = [m.loss(part)["loss"] for part in batch().split(4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    torch.manual_seed(99)
    torch.testing.assert_close(whole, m.loss(batch())["loss"], rtol=0, atol=0)


def test_one_phase_trains_everything():
    m = model()
    (phase,) = m.phases()
    phase.loss(batch())["loss"].backward()
    learning = {id(p) for module in phase.modules for p in module.parameters()}
    assert learning == {id(p) for p in m.parameters()}
    assert all(p.grad is not None for p in m.parameters())


def test_perfect_network_has_no_loss():
    m = model(classes=0)

    class Perfect(nn.Module):
        def forward(self, x, time, embedded):
            t = time[:, None, None, None]
            scale = ((1 - t) ** 2 + t**2).sqrt()
            return (x * scale - (1 - t) * 0.5) / t - 0.5  # the picture is 0.5 everywhere

    m.network = Perfect()
    b = batch()
    b = Batch(torch.full_like(b.image, 0.5), b.condition, 0, b.rng)
    assert m.loss(b)["loss"] < 1e-9
    for solver in solvers.SOLVERS:
        drawn = m.sample(Condition(4), Rng(range(4)), solver=solver, steps=5)
        torch.testing.assert_close(drawn, torch.full((4, *SHAPE), 0.5), rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_an_image_depends_on_its_seed_alone(solver):
    m = model()
    label = torch.tensor([0, 1, 2])
    three = m.sample(Condition(3, label), Rng([7, 8, 9]), solver=solver, steps=4, guidance=2.0)
    one = m.sample(Condition(1, label[2:]), Rng([9]), solver=solver, steps=4, guidance=2.0)
    assert three.shape == (3, *SHAPE) and three.abs().max() <= 1
    torch.testing.assert_close(three[2:], one)


@torch.inference_mode()
def test_sample_steps_ends_with_the_sample():
    m = model()
    states = list(m.sample_steps(Condition(2), Rng([1, 2]), solver="ddim", steps=6))
    assert len(states) == 6
    torch.testing.assert_close(
        states[-1], m.sample(Condition(2), Rng([1, 2]), solver="ddim", steps=6)
    )


@torch.inference_mode()
def test_guidance_calls_the_network_once_for_both():
    m = model()
    condition = Condition(3, torch.tensor([0, 1, 2]))
    plain = m.sample(condition, Rng(range(3)), steps=5, guidance=1.0)
    assert m.network.calls == [3] * 5
    m.network.calls.clear()
    guided = m.sample(condition, Rng(range(3)), steps=5, guidance=3.0)
    assert m.network.calls == [6] * 5
    assert not torch.allclose(plain, guided)
    nothing = m.sample(condition, Rng(range(3)), steps=5, guidance=0.0)
    torch.testing.assert_close(nothing, m.sample(Condition(3), Rng(range(3)), steps=5))


@torch.inference_mode()
def test_samples_stay_bounded_with_a_wild_network():
    m = model()
    m.network.mix.weight.mul_(1000)
    drawn = m.sample(Condition(4), Rng(range(4)), steps=8)
    assert drawn.isfinite().all() and drawn.abs().max() <= 1


@pytest.mark.parametrize(
    "options,message",
    [
        ({"solver": "dimm"}, "expected one of ddpm, ddim, euler"),
        ({"grid": "odd"}, "even_time"),
        ({"steps": 0}, "at least 1"),
        ({"solver": "heun", "eta": 1.0}, "no option 'eta'"),
        ({"solver": "ddim", "variance": "large"}, "no option 'variance'; it has eta"),
        ({"solver": "ddim", "eta": "much"}, "'eta' is 'much'; expected 0 or more, such as 0.0"),
        ({"solver": "euler", "eta": 1.0}, "no option 'eta'; it has none"),
        ({"grid": [1.0, 0.5, 0.0]}, "the grid has 2 steps, and steps is 20"),
        ({"grid": [1.0, 0.5, 0.7], "steps": 2}, "fall from 1 to 0"),
    ],
)
def test_wrong_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        model().sample(Condition(1), Rng([0]), **options)


def test_what_cannot_be_guided_says_so():
    label = torch.tensor([0])
    for m in (model(dropout=0.0), model(classes=0)):
        with pytest.raises(ValueError, match="dropout"):
            m.sample(Condition(1, label), Rng([0]), guidance=2.0)
    with pytest.raises(ValueError, match="no labels"):
        model(dropout=0.0).sample(Condition(1), Rng([0]))
    with pytest.raises(ValueError, match="knows 0 to 2"):
        model().sample(Condition(1, torch.tensor([3])), Rng([0]))
    model(classes=0).sample(Condition(1, label), Rng([0]))  # a label says nothing to it


def test_wrong_parts_are_explained():
    with pytest.raises(ValueError, match="noise, image, velocity, straight"):
        model(target="nose")
    with pytest.raises(ValueError, match="l2, l1, huber"):
        model(loss="l3")
    with pytest.raises(ValueError, match="use velocity or straight"):
        model(target="noise")
    with pytest.raises(ValueError, match="use velocity or straight"):
        model(schedule=schedules.ZeroTerminal(schedules.Cosine()), target="noise")
    with pytest.raises(ValueError, match="dropout is 1"):
        Labels(3, 8, 1)


def test_dropout_replaces_labels_by_nothing():
    labels = Labels(2, 8, dropout=0.25)
    condition = Condition(4000, torch.zeros(4000, dtype=torch.int64))
    vector = labels(condition, Rng(range(4000))).vector
    dropped = (vector == labels.nothing(Condition(1)).vector).all(1).float().mean()
    assert abs(dropped - 0.25) < 0.03
    assert (labels(condition).vector == labels.table.weight[0]).all()
