"""ProGAN: the layers' laws, growth as a function of the images seen, fading, and that it learns."""

import pytest
import torch
import torch.nn.functional as F

import tiny
from trilemma.batch import Batch, Condition, Rng
from trilemma.models.progan import ProGAN, growth
from trilemma.networks.progan import (
    HE,
    Conv,
    Critic,
    Dense,
    Generator,
    enlarge,
    minibatch_deviation,
    pixel_norm,
    sizes,
)

SHAPE = (1, 16, 16)  # stages of 4, 8 and 16 pixels
STAGE_2_FADE = 64  # images seen, in the fade from 8 to 16 pixels of make()


def make(classes=0, shape=SHAPE, **options):
    torch.manual_seed(0)
    return ProGAN(
        Generator(shape, latent=8, channels=4, classes=classes),
        Critic(shape, channels=4, classes=classes),
        **{"stage_images": 8, "fade_images": 32, **options},
    )


def batch(count=8, classes=0, seen=0, shape=SHAPE):
    label = torch.arange(count) % classes if classes else None
    image = Rng(range(count)).uniform(*shape) * 2 - 1
    return Batch(image, Condition(count, label=label), seen, Rng(range(count)))


def inputs(model, count=4):
    rng = Rng(range(count))
    return rng.normal(model.latent), torch.zeros(count, 0)


# Growth.


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (0, (0, 1.0)),
        (9, (0, 1.0)),
        (10, (1, 0.0)),
        (15, (1, 0.25)),
        (29, (1, 0.95)),
        (30, (1, 1.0)),
        (39, (1, 1.0)),
        (40, (2, 0.0)),
        (50, (2, 0.5)),
        (60, (2, 1.0)),
        (10**9, (2, 1.0)),
    ],
)
def test_growth_is_known(seen, expected):
    """10 images at a stage, 20 of fading: full size after (3 - 1) * 30."""
    assert growth(seen, 3, 10, 20) == pytest.approx(expected)


@pytest.mark.parametrize(("stage", "fade"), [(10, 20), (7, 0), (0, 5), (0, 0), (1, 1)])
def test_growth_never_goes_back(stage, fade):
    grown = [growth(seen, 4, stage, fade) for seen in range(200)]
    assert all(0 <= alpha <= 1 and 0 <= k < 4 for k, alpha in grown)
    sums = [k + alpha for k, alpha in grown]
    assert sums == sorted(sums)
    assert grown[3 * (stage + fade)] == (3, 1.0)
    if fade == 0:
        assert all(alpha == 1 for _, alpha in grown)


def test_no_lengths_no_growth():
    assert growth(0, 5, 0, 0) == (4, 1.0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(28, [7, 14, 28]), (64, [4, 8, 16, 32, 64]), (36, [5, 10, 20, 40]), (8, [4, 8])],
)
def test_stages_of_a_size(size, expected):
    assert sizes((3, size, size)) == [(side, side) for side in expected]


# Layers.


@pytest.mark.parametrize(
    "layer",
    [
        lambda: (Dense(200, 300, gain=1.0), torch.randn(500, 200)),
        lambda: (Conv(64, 64, 3, gain=1.0), torch.randn(20, 64, 12, 12)),
        lambda: (Conv(64, 64, 1, gain=1.0), torch.randn(20, 64, 12, 12)),
    ],
)
def test_equalized_layers_keep_unit_variance(layer):
    torch.manual_seed(0)
    layer, x = layer()
    assert layer.weight.std().item() == pytest.approx(1, abs=0.02), "the scale is not in W"
    out = layer(x)
    out = out[:, :, 1:-1, 1:-1] if out.ndim == 4 else out  # the border sees zeros
    assert out.var().item() == pytest.approx(1, abs=0.05)
    layer.scale *= HE
    kept = F.leaky_relu(layer(x), 0.2)
    kept = kept[:, :, 1:-1, 1:-1] if kept.ndim == 4 else kept
    assert kept.square().mean().item() == pytest.approx(1 + 0.2**2, abs=0.06), "He's scale"


def test_conv_up_is_enlarging_and_convolution():
    torch.manual_seed(0)
    up, x = Conv(3, 5, 3, up=True), torch.randn(2, 3, 6, 6)
    expected = F.conv2d(enlarge(x), up.weight * up.scale, up.bias, padding=1)
    assert torch.allclose(up(x), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 12), (5, 12, 3, 3)])
def test_pixel_norm_brings_the_mean_square_to_1(shape):
    x = torch.randn(shape) * 50 + 3
    normed = pixel_norm(x)
    assert torch.allclose(normed.square().mean(1), torch.ones_like(x[:, 0]), atol=1e-5)
    assert torch.allclose(F.cosine_similarity(normed, x, dim=1), torch.ones_like(x[:, 0]))


def test_minibatch_deviation_sees_a_collapse():
    torch.manual_seed(0)
    collapsed = torch.randn(1, 6, 5, 5).expand(4, 6, 5, 5)
    varied = torch.randn(4, 6, 5, 5)
    out = minibatch_deviation(torch.cat([collapsed, varied]))
    assert torch.equal(out[:, :6], torch.cat([collapsed, varied]))
    assert torch.allclose(out[:4, 6], torch.tensor(1e-4), atol=1e-6)
    expected = varied.std(0, correction=0).mean()
    assert torch.allclose(out[4:, 6], expected, atol=1e-4)


def test_minibatch_deviation_of_known_values():
    """The deviation of (-3, -1, 1, 3) is the root of 5."""
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    assert torch.allclose(minibatch_deviation(x)[:, 2], torch.tensor(5.0).sqrt())


@pytest.mark.parametrize("count", [1, 3, 4, 6, 12])
def test_minibatch_deviation_takes_any_batch(count):
    assert minibatch_deviation(torch.randn(count, 2, 3, 3)).shape == (count, 3, 3, 3)


# Fading.


@pytest.mark.parametrize("stage", [1, 2])
def test_at_alpha_0_nothing_has_changed(stage):
    model = make()
    latent, label = inputs(model)
    with torch.no_grad():
        before = model.generator(latent, label, stage - 1, 1.0)
        grown = model.generator(latent, label, stage, 0.0)
        assert torch.equal(grown, enlarge(before))
        image = torch.randn(4, 1, *model.sizes[stage])
        score = model.critic(F.avg_pool2d(image, 2), label, stage - 1, 1.0)
        assert torch.equal(model.critic(image, label, stage, 0.0), score)


@pytest.mark.parametrize("stage", [1, 2])
def test_at_alpha_1_the_old_path_has_no_influence(stage):
    model = make()
    latent, label = inputs(model)
    image = torch.randn(4, 1, *model.sizes[stage])
    with torch.no_grad():
        drawn = model.generator(latent, label, stage, 1.0)
        score = model.critic(image, label, stage, 1.0)
        model.generator.to_rgb[stage - 1].weight.fill_(torch.nan)
        model.critic.from_rgb[stage - 1].weight.fill_(torch.nan)
        assert torch.equal(model.generator(latent, label, stage, 1.0), drawn)
        assert torch.equal(model.critic(image, label, stage, 1.0), score)
    assert drawn.isfinite().all() and score.isfinite().all()


def test_between_the_two_paths_are_blended():
    model = make()
    latent, label = inputs(model)
    with torch.no_grad():
        old, new, some = (model.generator(latent, label, 2, alpha) for alpha in (0.0, 1.0, 0.3))
    assert torch.allclose(some, 0.7 * old + 0.3 * new, atol=1e-6)


def test_real_images_are_pooled_and_blended_as_fakes_are():
    model, image = make(), batch().image
    assert torch.equal(model.shrink(image, 2, 1.0), image)
    at_8 = F.avg_pool2d(image, 2)
    assert torch.equal(model.shrink(image, 1, 1.0), at_8)
    coarse = enlarge(F.avg_pool2d(image, 4))
    assert torch.allclose(model.shrink(image, 1, 0.0), coarse, atol=1e-6)
    assert torch.allclose(model.shrink(image, 1, 0.3), 0.7 * coarse + 0.3 * at_8, atol=1e-6)
    assert model.shrink(image, 0, 1.0).shape == (8, 1, 4, 4)


def test_the_critic_is_shown_real_and_fake_alike():
    """What reaches the critic in a fade: real images, fakes and points between, of one size."""
    model, shown = make(), []
    model.critic.register_forward_pre_hook(lambda module, given: shown.append(given))
    model.critic_loss(batch(seen=24))
    (real, *_), (fake, *_), (between, *_) = shown
    assert real.shape == fake.shape == between.shape == (8, 1, 8, 8)
    assert torch.equal(real, model.shrink(batch().image, 1, 0.5))
    assert all(stage == 1 and alpha == 0.5 for _, _, stage, alpha in shown)


# Training.


@pytest.mark.parametrize(
    ("seen", "rgb", "blocks"),
    [(0, [0], []), (24, [0, 1], [0]), (44, [1], [0]), (64, [1, 2], [0, 1]), (999, [2], [0, 1])],
)
def test_what_learns_when(seen, rgb, blocks):
    """Layers of later stages are not computed, colour layers of past ones no longer."""
    model = make()
    for phase, rgbs in zip(model.phases(), ["from_rgb", "to_rgb"], strict=True):
        (player,) = phase.modules
        model.zero_grad()
        phase.loss(batch(seen=seen))["loss"].backward()
        for name, active in ((rgbs, rgb), ("blocks", blocks)):
            for i, module in enumerate(getattr(player, name)):
                have = {p.grad is not None for p in module.parameters()}
                assert have == {i in active}, (seen, name, i)


def test_the_optimizer_leaves_what_has_no_gradient():
    model = make()
    optimizer = torch.optim.Adam(model.generator.parameters(), lr=0.1, fused=True)
    before = {name: p.clone() for name, p in model.generator.named_parameters()}
    model.generator_loss(batch(seen=44))["loss"].backward()  # 8 pixels, grown
    optimizer.step()
    same = {name for name, p in model.generator.named_parameters() if torch.equal(p, before[name])}
    unused = {name for name in before if name.startswith(("to_rgb.0", "to_rgb.2", "blocks.1"))}
    assert same == unused
    assert len(optimizer.state) == len(before) - len(unused)


@pytest.mark.parametrize("seen", [0, 24, STAGE_2_FADE, 999])
def test_loss_does_not_depend_on_the_split(seen):
    model = make(classes=3)
    for phase in model.phases():
        whole = phase.loss(batch(8, 3, seen))["loss"]
        parts = [phase.loss(part)["loss"] for part in batch(8, 3, seen).split(2)]
        assert torch.allclose(torch.stack(parts).mean(), whole, atol=1e-5)


def test_loss_leaves_torchs_generator_alone():
    model, before = make(), torch.random.get_rng_state()
    for phase in model.phases():
        phase.loss(batch(seen=24))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_second_derivative_under_bf16():
    """The loss's gradient under autocast is that of float32, to bf16's rounding."""
    gradients = []
    for enabled in (False, True):
        model = make(weight=1000.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.critic_loss(batch(seen=STAGE_2_FADE))["loss"].backward()
        grads = [p.grad.flatten() for p in model.critic.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98


def test_the_resumed_contract_run_stops_inside_a_fade():
    """test_contract stops every recipe at step 4 of 7, with batches of 8: here growth is under way.

    So that its test of exact resume is one of a fade, and goes on into the next stage's.
    """
    lengths = tiny.SMALL["models.progan.ProGAN"]
    first, middle, last = (growth(8 * step, 3, *lengths.values()) for step in (0, 4, 7))
    assert first == (0, 1.0)
    assert middle[0] == 1 and 0 < middle[1] < 1
    assert last[0] == 2 and 0 < last[1] < 1


# Sampling.


def test_a_model_stopped_in_its_growth_draws_at_its_size():
    model = make()
    model.critic_loss(batch(seen=24))
    again = make()
    again.load_state_dict(model.state_dict())
    drawn = again.eval().sample(Condition(2), Rng([1, 2]))
    latent = Rng([1, 2]).normal(model.latent)
    with torch.no_grad():
        small = again.generator(latent, torch.zeros(2, 0), 1, 0.5)
    assert torch.equal(drawn, enlarge(small).clamp(-1, 1))
    assert drawn.shape == (2, *SHAPE)


def test_a_picture_depends_on_its_seed_alone():
    model = make(classes=3).eval()
    model.seen.fill_(999)
    label = torch.tensor([0, 1, 2, 0])
    together = model.sample(Condition(4, label=label), Rng([5, 6, 7, 8]))
    alone = model.sample(Condition(1, label=label[2:3]), Rng([7]))
    assert torch.allclose(together[2:3], alone, atol=1e-6)
    other = model.sample(Condition(1, label=label[:1]), Rng([7]))
    assert not torch.allclose(alone, other), "the label is read"


@pytest.mark.parametrize("shape", [(3, 36, 36), (1, 28, 28), (3, 24, 40), (1, 9, 9)])
@pytest.mark.parametrize("seen", [0, 24, 10**6])
def test_any_size(shape, seen):
    model = make(shape=shape)
    for phase in model.phases():
        assert phase.loss(batch(4, shape=shape, seen=seen))["loss"].isfinite()
    assert model.sample(Condition(2), Rng([1, 2])).shape == (2, *shape)


# Bad input.


@pytest.mark.parametrize("name", ["stage_images", "fade_images"])
def test_a_negative_length_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        make(**{name: -1})


def test_too_small_is_said():
    with pytest.raises(ValueError, match="4 pixels.*at least 8"):
        make(shape=(3, 4, 4))


def test_label_is_asked_for():
    with pytest.raises(ValueError, match="3 classes.*label"):
        make(classes=3).sample(Condition(2), Rng([1, 2]))


# Learning.


def test_it_learns_two_brightnesses_as_it_grows():
    """Class 0 is black, class 1 white: after a short training so are the samples."""
    model = make(classes=2, stage_images=16 * 40, fade_images=16 * 20)
    label = torch.arange(16) % 2
    image = (label.float() * 1.6 - 0.8)[:, None, None, None].expand(16, *SHAPE)
    phases = model.phases()
    optimizers = [
        torch.optim.Adam([p for m in phase.modules for p in m.parameters()], 1e-2, (0.0, 0.99))
        for phase in phases
    ]
    for step in range(150):
        rng = Rng(range(16 * step, 16 * step + 16))
        part = Batch(image, Condition(16, label=label), 16 * step, rng)
        for phase, optimizer in zip(phases, optimizers, strict=True):
            optimizer.zero_grad()
            phase.loss(part)["loss"].backward()
            optimizer.step()
    assert model.growth(int(model.seen)) == (2, 1.0)
    drawn = model.sample(Condition(16, label=label), Rng(range(16))).mean((1, 2, 3))
    assert drawn[label == 0].mean() < -0.3
    assert drawn[label == 1].mean() > 0.3
