"""PixelCNN and transformers: causality, probabilities that sum to 1, memory, completion."""

import itertools
import math

import pytest
import torch

from trilemma.batch import Batch, Condition, Rng, to_float, to_uint8
from trilemma.codecs import CodeTokens, PixelTokens
from trilemma.model import Frozen
from trilemma.models.autoregressive import Autoregressive, PixelAutoregressive, PixelCNN
from trilemma.models.mixture import LogisticMixture, draw
from trilemma.networks.layers import one_hot
from trilemma.networks.pixelcnn import Memory
from trilemma.networks.pixelcnn import PixelCNN as PixelNetwork
from trilemma.networks.transformer import Cache, CausalTransformer, turns

KINDS = ["pixelcnn", "transformer"]
GREY, COLOUR = (1, 5, 6), (3, 4, 5)


def make(kind, shape=GREY, classes=0, levels=256):
    """Build a small model whose layers all have a say, as after some training."""
    torch.manual_seed(0)
    if kind == "pixelcnn":
        network = PixelNetwork(shape[0], channels=8, dilations=(1, 2), classes=classes)
        model = PixelCNN(shape, network, classes, mixtures=3)
    else:
        network = CausalTransformer(width=16, layers=2, heads=2)
        model = PixelAutoregressive(PixelTokens(shape, levels), network, classes)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pictures(count, shape=GREY, seed=0):
    levels = Rng(range(seed, seed + count)).integers(256, *shape)
    return to_float(levels.to(torch.uint8))


def log_probs(mixture):
    """Return log P of every level (256,) of the last channel of a mixture over one pixel."""
    image = pictures(1, (mixture.mean.shape[-1], 1, 1)).expand(256, -1, -1, -1).clone()
    image[:, -1, 0, 0] = torch.arange(256) / 127.5 - 1
    return mixture.log_prob(image)[:, 0, 0].double()


def mixture(channels, seed=0):
    torch.manual_seed(seed)
    kinds = LogisticMixture.parameters(channels)
    return LogisticMixture.of(3 * torch.randn(1, 4 * sum(kinds), 1, 1), channels)


def first(mixture, channels):
    """Return the mixture of the first channels alone."""
    return LogisticMixture(
        mixture.logits,
        mixture.mean[..., :channels],
        mixture.log_scale[..., :channels],
        mixture.slope[..., : channels * (channels - 1) // 2],
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_channels_levels_sum_to_its_probability_without_it(seed):
    """Sum over the 256 levels of channel c of P(x_0, ..., x_c) is P(x_0, ..., x_{c-1})."""
    colour = mixture(3, seed)
    before = torch.zeros((), dtype=torch.float64)
    for channels in (1, 2, 3):
        part = first(colour, channels)
        joint = log_probs(part)
        assert torch.allclose(joint.logsumexp(0), before, atol=1e-4)
        image = pictures(1, (channels, 1, 1))
        before = part.log_prob(image)[0, 0, 0].double()


def test_a_sharp_mixture_far_from_the_pixel_is_finite_and_has_gradients():
    output = torch.zeros(1, 3, 1, 1)
    output[0, 1:] = torch.tensor([5.0, -9.0])[:, None, None]
    output.requires_grad_(True)
    value = LogisticMixture.of(output, 1).log_prob(to_float(torch.full((1, 1, 1, 1), 7)))
    value.sum().backward()
    assert value.isfinite().all() and output.grad[0, 1].abs().item() > 100


def test_the_mixture_draws_what_it_says():
    colour, count = mixture(2, 1), 20_000
    uniform = Rng(range(count)).uniform(1, 1, 3)
    many = LogisticMixture(*(v.expand(count, *v.shape[1:]) for v in vars(colour).values()))
    levels = to_uint8(many.sample(uniform, 1.0)).flatten(1).long()  # (N, 2)
    expected = log_probs(first(colour, 1)).exp()
    drawn = torch.bincount(levels[:, 0], minlength=256) / count
    assert (drawn - expected).abs().sum() < 0.1
    mean = to_float(levels.to(torch.uint8)).mean(0)
    grid = torch.cartesian_prod(*[torch.arange(256.0) / 127.5 - 1] * 2)[:, :, None, None]
    joint = colour.log_prob(grid).flatten().exp()
    assert torch.allclose(mean, (joint[:, None] * grid[:, :, 0, 0]).sum(0), atol=0.02)


def test_draw():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    uniform = Rng(range(20_000)).uniform()
    drawn = draw(logits.expand(20_000, 4), uniform, 1.0)
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.allclose(shares, logits.softmax(0), atol=0.015)
    cold = draw(logits.expand(20_000, 4), uniform, 0.5)
    assert torch.allclose(
        torch.bincount(cold, minlength=4) / 20_000, (2 * logits).softmax(0), atol=0.015
    )
    assert (draw(logits.expand(20_000, 4), uniform, 0.0) == 3).all()
    assert (draw(logits.expand(20_000, 4), uniform, 1e-3) == 3).all()
    assert set(draw(logits.expand(20_000, 4), uniform, 1.0, top_k=2).tolist()) == {1, 3}
    assert (draw(logits.expand(20_000, 4), uniform, 1.0, top_k=1) == 3).all()
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    assert draw(logits.expand(2, 4), ends, 1.0).tolist() == [0, 3]


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_pixelcnn_sees_all_pixels_before_and_none_after(shape, classes):
    model = make("pixelcnn", shape, classes)
    label = one_hot(torch.zeros(1, dtype=torch.int64), classes, 1, torch.device("cpu"))
    image = pictures(1, shape).requires_grad_(True)
    features = model.network(image, label)
    height, width = shape[1:]
    seen = torch.zeros(height * width, height * width)
    for i in range(height * width):
        (gradient,) = torch.autograd.grad(
            features.flatten(2)[0, :, i].square().sum(), image, retain_graph=True
        )
        seen[i] = gradient[0].abs().sum(0).flatten()
    assert not seen.triu().any(), "a pixel sees itself or one after it"
    assert seen[-1, :-1].all(), "the last pixel is blind to one before it"


def test_a_channel_sees_the_channels_before_it_alone():
    """The mean of channel c moves with channels before it and with no other."""
    colour = mixture(3)
    for channel in range(3):
        x = torch.zeros(1, 1, 1, 1, 3, requires_grad=True)
        colour._mean(channel, x[..., :channel]).sum().backward()
        moved = x.grad[0, 0, 0, 0] != 0 if x.grad is not None else torch.zeros(3, dtype=torch.bool)
        assert moved.tolist() == [d < channel for d in range(3)]


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_a_tokens_logits_see_all_tokens_before_and_none_after(shape):
    model = make("transformer", shape, classes=2)
    label = torch.eye(2)[:1]
    tokens = model.codec.encode(pictures(1, shape))
    embedded = model.token(tokens[:, :-1]).detach().requires_grad_(True)
    model.token.forward = lambda _: embedded
    logits = model.logits(tokens[:, :-1], label)
    count = tokens.shape[1]
    seen = torch.zeros(count, count - 1)
    for i in range(count):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), embedded, retain_graph=True)
        seen[i] = gradient[0].abs().sum(1)
    assert not seen.triu().any(), "a token sees itself or one after it"
    assert (seen.tril(-1) != 0).sum() == count * (count - 1) / 2, "a token is blind to one before"


def test_all_pictures_of_two_levels_sum_to_1():
    """Sum of p over the 64 two-level pictures of 2 x 3 pixels, for the class and over classes."""
    model = make("transformer", (1, 2, 3), classes=2, levels=2)
    images = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6))).view(-1, 1, 2, 3)
    behind = 6 * math.log(128)  # 8-bit pictures that look the same in two levels
    for label in (None, torch.ones(64, dtype=torch.int64)):
        total = model.log_prob(images, label).double().logsumexp(0) + behind
        assert abs(total.item()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_all_pictures_of_two_pixels_sum_to_1(kind):
    model = make(kind, (1, 1, 2))
    images = torch.cartesian_prod(*[torch.arange(256.0) / 127.5 - 1] * 2).view(-1, 1, 1, 2)
    total = torch.cat([model.log_prob(part) for part in images.split(8192)]).double().logsumexp(0)
    assert abs(total.item()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_without_a_label_is_over_all_classes(kind):
    model, image = make(kind, classes=3), pictures(4)
    each = [model.log_prob(image, torch.full((4,), k)) for k in range(3)]
    expected = torch.stack(each).logsumexp(0) - math.log(3)
    assert torch.allclose(model.log_prob(image), expected, atol=1e-3)
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    assert model.discrete and not model.bound


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_likelihood(kind):
    model, image = make(kind, COLOUR, classes=3), pictures(4, COLOUR)
    condition = Condition(4, label=torch.tensor([0, 1, 2, 0]))
    losses = model.loss(Batch(image, condition, 0, Rng(range(4))))
    expected = -model.log_prob(image, condition.label).mean() / 60
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_pixelcnn_remembers_what_a_whole_pass_computes():
    model = make("pixelcnn", COLOUR, classes=2)
    image, label = pictures(2, COLOUR), torch.eye(2)
    whole = model.network(image, label)
    for start in (0, 2):
        memory = Memory(row=start)
        for row, column in itertools.product(range(start, 4), range(5)):
            drawn = image.clone()
            drawn[:, :, row, column:] = drawn[:, :, row + 1 :] = 9  # not drawn yet: not to be read
            features = model.network(drawn, label, memory)[:, :, 0, 0]
            assert torch.allclose(features, whole[:, :, row, column], atol=1e-5)


def test_the_cache_remembers_what_a_whole_pass_computes():
    model = make("transformer", classes=2)
    tokens, label = model.codec.encode(pictures(2)), torch.eye(2)
    whole = model.logits(tokens[:, :-1], label)
    for known in (0, 7):
        cache = Cache(tokens.shape[1])
        assert torch.allclose(
            model.logits(tokens[:, :known], label, cache), whole[:, : known + 1], atol=1e-5
        )
        for i in range(known + 1, tokens.shape[1]):
            logits = model.logits(tokens[:, :i], label, cache)
            assert logits.shape[1] == 1
            assert torch.allclose(logits[:, 0], whole[:, i], atol=1e-5)
    with pytest.raises(ValueError, match="2 positions were given to a cache in use"):
        model.network(torch.zeros(2, 2, 16), torch.zeros(2, 2), cache)


def test_sampling_with_and_without_memory_is_the_same_picture():
    condition, rng = Condition(3, label=torch.tensor([0, 1, 1])), range(3)
    label = one_hot(condition.label, 2, 3, torch.device("cpu"))
    model = make("pixelcnn", COLOUR, classes=2)
    image, uniform = torch.zeros(3, *COLOUR), Rng(rng).uniform(4, 5, 4)
    with torch.no_grad():
        for row, column in itertools.product(range(4), range(5)):
            drawn = model.mixture(image, label).sample(uniform, 1.0)
            image[:, :, row, column] = drawn[:, :, row, column]
    assert torch.equal(model.sample(condition, Rng(rng)), image)
    model = make("transformer", COLOUR, classes=2)
    tokens, uniform = torch.zeros(3, 0, dtype=torch.int64), Rng(rng).uniform(60)
    for i in range(60):
        drawn = draw(model.logits(tokens, label)[:, -1], uniform[:, i], 1.0)
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    assert torch.equal(model.sample(condition, Rng(rng)), model.codec.decode(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_depends_on_its_seed_and_class_alone(kind):
    model, label = make(kind, classes=3), torch.tensor([0, 1, 2, 0])
    together = model.sample(Condition(4, label=label), Rng([5, 6, 7, 8]))
    alone = model.sample(Condition(1, label=label[2:3]), Rng([7]))
    assert torch.equal(together[2:3], alone)
    assert together.shape == (4, *GREY) and together.abs().max() <= 1
    assert torch.equal(to_float(to_uint8(together)), together), "not on 8-bit levels"


@pytest.mark.parametrize("kind", KINDS)
def test_completion_keeps_the_known_rows_and_reads_no_other(kind):
    model = make(kind, COLOUR, classes=3)
    condition = Condition(2, label=torch.tensor([0, 2]))
    image = Rng(range(2)).uniform(*COLOUR) * 2 - 1  # on no 8-bit level
    other = image.clone()
    other[:, :, 2:] = -1
    done = model.complete(image, 2, condition, Rng(range(2)))
    assert torch.equal(done[:, :, :2], image[:, :, :2])
    assert torch.equal(done, model.complete(other, 2, condition, Rng(range(2))))
    assert not torch.equal(done[:, :, 2:], image[:, :, 2:])
    assert torch.equal(model.complete(image, 4, condition, Rng(range(2))), image)
    fresh = model.complete(image, 0, condition, Rng(range(2)))
    assert torch.equal(fresh, model.sample(condition, Rng(range(2))))


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_0_is_the_mode(kind):
    model, condition = make(kind), Condition(2)
    still = model.sample(condition, Rng([1, 2]), temperature=0.0)
    assert torch.equal(still[0], still[1])
    cold = model.sample(condition, Rng([1, 2]), temperature=1e-4)
    assert (cold - still).abs().max() <= 2 / 255
    if kind == "transformer":
        logits = model.logits(model.codec.encode(still)[:, :-1], torch.zeros(2, 0))
        assert torch.equal(logits.argmax(-1), model.codec.encode(still))
        assert torch.equal(model.sample(condition, Rng([1, 2]), top_k=1), still)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_pictures_and_their_class(kind):
    """Class 0 dark above and bright below, class 1 the other way round."""
    model = make(kind, classes=2, levels=256).train()
    label = torch.arange(8) % 2
    image = torch.where((torch.arange(5) < 2)[:, None], -0.6, 0.8).expand(8, 1, 5, 6)
    image = torch.where(label[:, None, None, None] == 0, image, -image)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        losses = model.loss(Batch(image, Condition(8, label=label), 0, Rng(range(8))))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    drawn = model.eval().sample(Condition(8, label=label), Rng(range(8)), temperature=0.0)
    assert (drawn - image).abs().max() < 0.1
    right, wrong = (model.log_prob(image, k) for k in (label, 1 - label))
    assert (right > wrong + 3).all()
    blank = image.clone()
    blank[:, :, 1:] = 0
    done = model.complete(blank, 1, Condition(8), Rng(range(8)), temperature=0.0)
    assert (done - image).abs().max() < 0.1, "the first row tells the class"


class Coin(torch.nn.Module):
    """Features of the class alone, at every position."""

    width = 3

    def forward(self, x, place, cache=None):
        if cache is None or not cache.length:
            self.first = x[:, :1]
        if cache is not None:
            cache.length += x.shape[1]
        return self.first.expand(-1, x.shape[1], -1)


def test_a_class_that_is_not_said_is_drawn_as_the_known_rows_tell():
    """Coins of three kinds: after two heads the next is a head by sum p^3 / sum p^2."""
    model = PixelAutoregressive(PixelTokens((1, 2, 2), 2), Coin(), classes=3)
    score = torch.tensor([-2.0, 0.0, 2.0])
    with torch.no_grad():
        model.start.weight.copy_(torch.eye(3))
        model.position.weight.zero_()
        model.head.weight.copy_(torch.stack([0 * score, score]))
        model.head.bias.zero_()
    count, head = 4000, score.sigmoid()
    image = torch.ones(count, 1, 2, 2)
    drawn = model.complete(image, 1, Condition(count), Rng(range(count)))[:, 0, 1]
    assert abs((drawn > 0).float().mean() - (head**3).sum() / (head**2).sum()) < 0.02
    both = (drawn > 0).all(1).float().mean()
    assert abs(both - (head**4).sum() / (head**2).sum()) < 0.03, "one class for both"
    told = model.complete(image, 1, Condition(count, torch.zeros(count).long()), Rng(range(count)))
    assert abs((told[:, 0, 1] > 0).float().mean() - head[0]) < 0.02


def test_turns_depend_on_distance_alone():
    q, k = torch.randn(2, 8)
    place = torch.tensor([[0, 0], [1, 3], [5, 2], [6, 5]])
    cos, sin = turns(place, 8)

    def turned(x):
        a, b = x.chunk(2)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=1)  # (4, 8)

    product = turned(q) @ turned(k).T
    assert torch.allclose(product[0, 1], product[2, 3], atol=1e-5)
    assert torch.allclose(product.diag(), (q @ k).expand(4), atol=1e-5)


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_pixel_tokens(levels):
    codec = PixelTokens(COLOUR, levels)
    assert (codec.vocabulary, codec.length, codec.grid) == (levels, 60, (4, 5, 3))
    tokens = Rng(range(3)).integers(levels, 60)
    assert torch.equal(codec.encode(codec.decode(tokens)), tokens)
    image = pictures(3, COLOUR)
    again = codec.decode(codec.encode(image))
    assert (again - image).abs().max() <= 2 / levels
    assert levels < 256 or torch.equal(again, image)
    order = codec.encode(image).view(3, 4, 5, 3)[:, 1, 2] * 256 // levels
    assert torch.equal(order, to_uint8(image)[:, :, 1, 2].long() * levels // 256 * 256 // levels)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input_is_named(kind):
    model = make(kind, classes=3)
    rng, condition = Rng(range(2)), Condition(2, label=torch.tensor([0, 2]))
    image = torch.zeros(2, *GREY)
    with pytest.raises(ValueError, match=r"shape \(\d+, 3, 5, 6\).*expected \(B, 1, 5, 6\)"):
        model.log_prob(torch.zeros(2, 3, 5, 6))
    with pytest.raises(ValueError, match=r"shape \(\d+, 1, 6, 5\).*expected \(B, 1, 5, 6\)"):
        model.complete(torch.zeros(2, 1, 6, 5), 2, condition, rng)
    with pytest.raises(ValueError, match="known_rows is 6; pictures have 0 to 5"):
        model.complete(image, 6, condition, rng)
    with pytest.raises(ValueError, match="temperature is -1"):
        model.sample(condition, rng, temperature=-1)
    with pytest.raises(ValueError, match="knows 0 to 2"):
        model.sample(Condition(2, label=torch.tensor([0, 3])), rng)
    with pytest.raises(ValueError, match="needs a label"):
        model.sample(Condition(2), rng)
    if kind == "transformer":
        with pytest.raises(ValueError, match="top_k is 0"):
            model.sample(condition, rng, top_k=0)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="levels is 100"):
        PixelTokens(GREY, 100)
    with pytest.raises(ValueError, match="width 20 must be a multiple of 4 times the 2 heads"):
        CausalTransformer(width=20, heads=2)
    with pytest.raises(ValueError, match="a trained Linear, which has no codes"):
        CodeTokens(Frozen(torch.nn.Linear(2, 2)), GREY)


class Stripes(torch.nn.Module):
    """A tokenizer by rule: each 2 x 2 block is dark, grey or bright."""

    codebook_size, code_shape = 3, (2, 3)

    def codes(self, image):
        means = torch.nn.functional.avg_pool2d(image, 2)[:, 0]
        return (means * 1.499).round().long() + 1

    def from_codes(self, codes):
        return (codes - 1)[:, None].float().repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_a_prior_over_codes():
    torch.manual_seed(0)
    codec = CodeTokens(Frozen(Stripes()), (1, 4, 6))
    model = Autoregressive(codec, CausalTransformer(16, 1, 2)).eval()
    tokens = Rng(range(4)).integers(3, 6)
    image = codec.decode(tokens)
    assert image.shape == (4, 1, 4, 6) and torch.equal(codec.encode(image), tokens)
    drawn = model.sample(Condition(4), Rng(range(4)))
    assert torch.equal(codec.decode(codec.encode(drawn)), drawn)
    odd = model.complete(image, 3, Condition(4), Rng(range(4)))  # a row and a half of codes
    assert torch.equal(odd[:, :, :3], image[:, :, :3])
    other = torch.cat([image[:, :, :3], -torch.ones(4, 1, 1, 6)], dim=2)
    assert torch.equal(odd, model.complete(other, 3, Condition(4), Rng(range(4))))
    whole = model.complete(image, 2, Condition(4), Rng(range(4)))
    assert torch.equal(codec.encode(whole)[:, :3], tokens[:, :3])
