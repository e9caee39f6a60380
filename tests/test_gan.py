"""GAN: the games' known values, the penalties' laws, labels, seeds, and that it learns."""

import math

import pytest
import torch
from torch import nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.models.gan import FEW, GAMES, GAN, gradient_norms, gradient_penalty
from trilemma.networks.dcgan import Critic, Generator

SHAPE = (1, 16, 16)


def make(classes=0, norm="none", labels="projection", attributes=0, **options):
    torch.manual_seed(0)
    known = {"classes": classes, "attributes": attributes}
    return GAN(
        Generator(SHAPE, latent=8, channels=4, **known),
        Critic(SHAPE, channels=4, norm=norm, labels=labels, **known),
        **options,
    )


def batch(count=6, classes=0, seed=0, seen=0):
    label = torch.arange(count) % classes if classes else None
    image = Rng(range(seed, seed + count)).uniform(*SHAPE) * 2 - 1
    return Batch(image, Condition(count, label=label), seen, Rng(range(seed, seed + count)))


@pytest.mark.parametrize(
    ("name", "critic", "generator"),
    [  # at real score 2, fake score -1
        ("non-saturating", math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)), math.log1p(math.e)),
        ("least-squares", 0.5 + 0.5, 2.0),
        ("hinge", 0.0, 1.0),
        ("wasserstein", -3.0, 1.0),
        ("relativistic", math.log1p(math.exp(-3)), math.log1p(math.exp(3))),
    ],
)
def test_losses_at_known_scores(name, critic, generator):
    real, fake = torch.tensor([2.0]), torch.tensor([-1.0])
    assert GAMES[name].critic(real, fake).item() == pytest.approx(critic, rel=1e-5)
    assert GAMES[name].generator(real, fake).item() == pytest.approx(generator, rel=1e-5)


@pytest.mark.parametrize("name", GAMES)
def test_generator_gains_by_higher_scores(name):
    real, fake = torch.zeros(1), torch.zeros(1, requires_grad=True)
    GAMES[name].generator(real, fake).sum().backward()
    assert fake.grad < 0


def test_relativistic_players_are_each_others_mirror():
    real, fake = torch.randn(2, 5)
    game = GAMES["relativistic"]
    assert torch.equal(game.generator(real, fake), game.critic(fake, real))
    assert torch.allclose(game.critic(real + 3, fake + 3), game.critic(real, fake), atol=1e-5)
    assert torch.allclose(game.critic(real, real), torch.full((5,), math.log(2)))


def test_least_squares_at_equilibrium():
    """A critic that knows nothing says 1/2: 1/4 for it, 1/8 for the generator."""
    half = torch.full((3,), 0.5)
    game = GAMES["least-squares"]
    assert torch.equal(game.critic(half, half), torch.full((3,), 0.25))
    assert torch.equal(game.generator(half, half), torch.full((3,), 0.125))


def test_only_a_paired_game_scores_real_images_for_the_generator():
    for game in GAMES:
        model, scored = make(game=game), []
        model.critic.register_forward_hook(lambda *_, scored=scored: scored.append(1))
        model.generator_loss(batch())
        assert len(scored) == (2 if game == "relativistic" else 1)


@pytest.mark.parametrize("game", GAMES)
def test_share_known_by_the_critic(game):
    """A critic that scores by brightness knows bright real from dark drawn images, for certain."""

    class Brightness(nn.Module):
        def forward(self, image, label):
            return 4 * image.mean((1, 2, 3)) + 0.5

    class Dark(Generator):
        def forward(self, latent, label):
            return super().forward(latent, label) * 0 - 1

    model = GAN(Dark(SHAPE, latent=8, channels=4), Brightness(), game=game)
    data = batch()
    bright = Batch(torch.ones_like(data.image), data.condition, 0, data.rng)
    losses = model.critic_loss(bright)
    relative = game in ("wasserstein", "relativistic")
    assert losses["ahead" if relative else "correct"] == 1
    assert ("correct" in losses) is not relative


def test_non_saturating_at_equilibrium():
    zero = torch.zeros(3)
    game = GAMES["non-saturating"]
    assert torch.allclose(game.critic(zero, zero), torch.full((3,), 2 * math.log(2)))
    assert torch.allclose(game.generator(zero, zero), torch.full((3,), math.log(2)))


def test_non_saturating_is_cross_entropy():
    real, fake = torch.randn(2, 5)
    bce = nn.BCEWithLogitsLoss(reduction="none")
    expected = bce(real, torch.ones(5)) + bce(fake, torch.zeros(5))
    assert torch.allclose(GAMES["non-saturating"].critic(real, fake), expected)
    assert torch.allclose(GAMES["non-saturating"].generator(real, fake), bce(fake, torch.ones(5)))


def test_hinge_is_flat_beyond_the_margin():
    game = GAMES["hinge"]
    assert game.critic(torch.tensor(1.5), torch.tensor(-2.0)) == 0
    assert game.critic(torch.tensor(0.0), torch.tensor(0.0)) == 2
    assert game.generator(torch.tensor(0.0), torch.tensor(3.0)) == -3


def test_wasserstein_ignores_a_shared_offset():
    game = GAMES["wasserstein"]
    real, fake = torch.randn(2, 5)
    assert torch.allclose(game.critic(real + 7, fake + 7), game.critic(real, fake), atol=1e-5)


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_gradient_penalty_of_a_linear_critic(slope):
    """A linear critic has the same slope everywhere; of slope 1 it is 1-Lipschitz: no penalty."""
    direction = torch.randn(1, 4, 4, dtype=torch.float64)
    direction = (slope * direction / direction.norm()).float()

    def critic(image):
        return (image * direction).flatten(1).sum(1)

    real, fake = torch.randn(2, 5, 1, 4, 4)
    penalty = gradient_penalty(critic, real, fake, torch.rand(5))
    assert torch.allclose(penalty, torch.full((5,), (slope - 1) ** 2), atol=1e-5)
    assert torch.allclose(gradient_norms(critic, real), torch.full((5,), slope**2), rtol=1e-5)


def test_gradient_penalty_looks_between_real_and_fake():
    """With D(x) = |x|^2 / 2 the gradient is x itself: the penalty tells where it was taken."""
    real, fake = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 7.0)
    penalty = gradient_penalty(
        lambda x: x.square().flatten(1).sum(1) / 2, real, fake, torch.tensor([0.0, 0.5])
    )
    assert torch.allclose(penalty, torch.tensor([4.0, 16.0]))


def test_penalty_of_a_flat_critic_has_a_finite_gradient():
    weight = torch.zeros(4, requires_grad=True)
    real, fake = torch.randn(2, 3, 1, 2, 2)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ weight, real, fake, torch.rand(3))
    penalty.mean().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("penalty", ["gradient", "r1", "r1+r2"])
def test_second_derivative_under_bf16(penalty):
    """The penalty's gradient under autocast is that of float32, to bf16's rounding."""
    gradients = []
    for enabled in (False, True):
        model = make(penalty=penalty, weight=1000.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.critic_loss(batch())["loss"]
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.critic.parameters()]))
    assert gradients[0].norm() > 0
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98


def test_each_player_moves_alone():
    model = make(penalty="gradient", critic_steps=5)
    critic, generator = model.phases()
    assert (critic.every, generator.every) == (1, 5)
    critic.loss(batch())["loss"].backward()
    assert all(p.grad is None for p in model.generator.parameters())
    assert all(p.grad is not None for p in model.critic.parameters())
    model.zero_grad()
    model.critic.requires_grad_(False)
    generator.loss(batch())["loss"].backward()
    assert all(p.grad is None for p in model.critic.parameters())
    assert all(p.grad is not None for p in model.generator.parameters())
    learning = [p for phase in model.phases() for m in phase.modules for p in m.parameters()]
    assert len({id(p) for p in learning}) == len(learning) == len(list(model.parameters()))


@pytest.mark.parametrize("penalty", ["none", "gradient", "r1", "r1+r2"])
@pytest.mark.parametrize(("flip", "share"), [(0.0, 1.0), (0.5, 1.0), (0.0, 0.5)])
def test_loss_does_not_depend_on_the_split(penalty, flip, share):
    options = {"penalty": penalty, "flip": flip, "share": share, "weight": 1000.0}
    model = make(classes=3, augment="on", noise=0.1, **options).eval()
    whole = model.critic_loss(batch(6, 3))["loss"]
    parts = [model.critic_loss(part)["loss"] for part in batch(6, 3).split(3)]
    assert torch.allclose(torch.stack(parts).mean(), whole, atol=1e-5)


def test_loss_leaves_torchs_generator_alone():
    model = make(penalty="gradient", flip=0.1, augment="on", noise=0.1)
    before = torch.random.get_rng_state()
    model.critic_loss(batch())
    model.generator_loss(batch())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_label_smoothing_is_cross_entropy_with_a_softer_target():
    """One-sided: target 0.9 for real, 0 for fake."""
    soft, plain = make(smooth=0.1).eval(), make().eval()
    latent = batch().rng.normal(8)
    none = torch.zeros(6, 0)
    real = plain.critic(batch().image, none)
    fake = plain.critic(plain.generator(latent, none), none)
    bce = nn.BCEWithLogitsLoss()
    expected = bce(real, torch.full((6,), 0.9)) + bce(fake, torch.zeros(6))
    assert torch.allclose(soft.critic_loss(batch())["loss"], expected, atol=1e-6)
    with pytest.raises(ValueError, match="smooth = 0"):
        make(game="hinge", smooth=0.1)


def test_label_noise_swaps_roles():
    """With every image swapped the critic is asked for the opposite."""
    model, swapped = make(game="wasserstein").eval(), make(game="wasserstein", flip=1.0).eval()
    loss = model.critic_loss(batch())["loss"]
    assert torch.allclose(swapped.critic_loss(batch())["loss"], -loss)


def test_share_of_the_penalty_is_unbiased():
    """Over many batches the penalty on a third of each has the mean of the whole."""
    whole, third = make(penalty="r1").eval(), make(penalty="r1", share=1 / 3).eval()
    for parameter in [*whole.critic.parameters(), *third.critic.parameters()]:
        parameter.data.mul_(8)
    a = torch.stack([whole.critic_loss(batch(6, seed=6 * i))["penalty"] for i in range(40)])
    b = torch.stack([third.critic_loss(batch(6, seed=6 * i))["penalty"] for i in range(40)])
    assert b.std() > a.std()
    assert abs(b.mean() - a.mean()) < 4 * b.std() / math.sqrt(40)


@pytest.mark.parametrize("penalty", ["gradient", "r1", "r1+r2"])
def test_no_image_of_a_part_may_enter_the_penalty(penalty):
    """A part of one image, with a share so small that it is left out."""
    model = make(penalty=penalty, share=1e-6)
    losses = model.critic_loss(batch(1))
    assert losses["penalty"] == 0
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.critic.parameters())


class Linear(nn.Module):
    """A critic of the same slope everywhere."""

    def __init__(self, slope):
        super().__init__()
        direction = torch.randn(SHAPE)
        self.weight = nn.Parameter(slope * direction / direction.norm())

    def forward(self, image, label):
        return (image * self.weight).flatten(1).sum(1)


@pytest.mark.parametrize(("penalty", "times"), [("r1", 1), ("r1+r2", 2)])
def test_r1_and_r2_of_a_linear_critic(penalty, times):
    """The gradient of D(x) = <w, x> is w at real and drawn images alike."""
    options = {"game": "relativistic", "weight": 0.7}
    model = GAN(Generator(SHAPE, 8, 4), Linear(3.0), penalty=penalty, **options).eval()
    plain = GAN(model.generator, model.critic, **options).eval()
    losses = model.critic_loss(batch())
    assert losses["penalty"].item() == pytest.approx(times * 9.0, rel=1e-5)
    added = losses["loss"] - plain.critic_loss(batch())["loss"]
    assert added.item() == pytest.approx(0.7 * times * 9.0, rel=1e-4)


def test_r2_looks_at_drawn_images():
    """With D(x) = |x|^2 / 2 the penalty is the mean square of what it is taken at."""

    class Square(nn.Module):
        def forward(self, image, label):
            return image.square().flatten(1).sum(1) / 2

    model = GAN(Generator(SHAPE, 8, 4), Square(), penalty="r1+r2").eval()
    fake = model.generator(batch().rng.normal(8), torch.zeros(6, 0))
    squares = [x.square().flatten(1).sum(1).mean() for x in (batch().image, fake)]
    assert torch.allclose(model.critic_loss(batch())["penalty"], sum(squares), rtol=1e-4)


def test_clipping_bounds_the_critic_alone():
    model = make(game="wasserstein", clip=0.01)
    critic, generator = model.phases()
    assert generator.after is None and critic.after is not None
    before = [p.clone() for p in model.generator.parameters()]
    critic.after()
    assert max(p.abs().max().item() for p in model.critic.parameters()) == pytest.approx(0.01)
    pairs = zip(before, model.generator.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert make(game="wasserstein").phases()[0].after is None


def test_instance_noise_fades():
    model = make(noise=0.5, noise_images=1000).eval()
    image = torch.zeros(64, *SHAPE)
    for seen, deviation in ((0, 0.5), (500, 0.25)):
        noisy = model._seen(image, Batch(image, Condition(64), seen, Rng(range(64))))
        assert noisy.std().item() == pytest.approx(deviation, rel=0.03)
    for seen in (1000, 5000):
        assert model._seen(image, Batch(image, Condition(64), seen, Rng(range(64)))) is image


def test_instance_noise_is_seen_by_both_players():
    plain, noisy = make().eval(), make(noise=0.5).eval()
    for loss in ("critic_loss", "generator_loss"):
        assert getattr(plain, loss)(batch())["loss"] != getattr(noisy, loss)(batch())["loss"]


def test_augmentation_is_on_for_few_pictures():
    assert make(augment="auto", count=FEW - 1).augment
    assert not make(augment="auto", count=FEW).augment
    assert make(augment="on", count=FEW).augment
    assert not make(count=10).augment


@pytest.mark.parametrize("labels", ["projection", "channels"])
@pytest.mark.parametrize("norm", ["none", "spectral"])
def test_a_critic_differs_by_label(labels, norm):
    critic = make(classes=3, labels=labels, norm=norm).critic.eval()
    image = batch().image[:1].expand(3, *SHAPE)
    scores = critic(image, torch.eye(3))
    assert len(set(scores.tolist())) == 3


def test_attributes_are_read_where_there_are_no_classes():
    model = make(attributes=2).eval()
    attributes = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    drawn = model.sample(Condition(2, attributes=attributes), Rng([1, 1]))
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(ValueError, match="reads 2 attributes; none were given"):
        model.sample(Condition(2), Rng([1, 2]))
    with pytest.raises(ValueError, match="reads 2 attributes; 3 were given"):
        model.sample(Condition(2, attributes=torch.zeros(2, 3)), Rng([1, 2]))
    both = make(classes=3, attributes=2).eval()
    label = torch.tensor([0, 1])
    assert both.sample(Condition(2, label=label), Rng([1, 2])).shape == (2, *SHAPE)


def test_a_picture_depends_on_its_seed_alone():
    model = make(classes=3).eval()
    label = torch.tensor([0, 1, 2, 0])
    together = model.sample(Condition(4, label=label), Rng([5, 6, 7, 8]))
    alone = model.sample(Condition(1, label=label[2:3]), Rng([7]))
    assert together.shape == (4, *SHAPE)
    assert together.abs().max() <= 1
    assert torch.allclose(together[2:3], alone, atol=1e-6)


def test_no_temperature_no_variety():
    model = make().eval()
    images = model.sample(Condition(2), Rng([1, 2]), temperature=0.0)
    assert torch.equal(images[0], images[1])


def test_label_is_asked_for():
    with pytest.raises(ValueError, match="3 classes.*label"):
        make(classes=3).sample(Condition(2), Rng([1, 2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "chess"}, "'chess'.*hinge"),
        ({"penalty": "r9"}, "'r9'.*gradient"),
        ({"augment": "yes"}, "'yes'.*'auto'"),
        ({"labels": "loud"}, "'loud'.*'channels'"),
        ({"share": 0.0}, "share is 0.0.*above 0"),
    ],
)
def test_unknown_choice_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"game": "non-saturating", "penalty": "r1", "weight": 0.1},
        {"game": "hinge", "norm": "spectral"},
        {"game": "wasserstein", "penalty": "gradient", "critic_steps": 3},
        {"game": "relativistic", "penalty": "r1+r2", "weight": 0.1, "labels": "channels"},
    ],
)
def test_it_learns_two_brightnesses(options):
    """Class 0 is black, class 1 white: after a short training so are the samples."""
    model = make(classes=2, **options)
    label = torch.arange(16) % 2
    image = (label.float() * 1.6 - 0.8)[:, None, None, None].expand(16, *SHAPE)
    phases = model.phases()
    optimizers = [
        torch.optim.Adam([p for m in phase.modules for p in m.parameters()], 5e-3, (0.0, 0.9))
        for phase in phases
    ]
    for step in range(150):
        for phase, optimizer in zip(phases, optimizers, strict=True):
            if step % phase.every == 0:
                rng = Rng(range(16 * step, 16 * step + 16))
                optimizer.zero_grad()
                phase.loss(Batch(image, Condition(16, label=label), 16 * step, rng))[
                    "loss"
                ].backward()
                optimizer.step()
    model.eval()
    drawn = model.sample(Condition(16, label=label), Rng(range(16))).mean((1, 2, 3))
    assert drawn[label == 0].mean() < -0.3
    assert drawn[label == 1].mean() > 0.3
