"""unCLIP: priors, decoder, and what joins them."""

import pytest
import torch

import tiny
import trilemma
from trilemma import checkpoint, joining, sampling, variation
from trilemma import data as pictures
from trilemma.batch import Batch, Condition, Rng, to_float
from trilemma.codecs import ClipEmbedding
from trilemma.conditioning import ClipImage, ClipText
from trilemma.errors import UserError
from trilemma.model import Frozen
from trilemma.models.clip import CLIP
from trilemma.models.unclip import AutoregressivePrior
from trilemma.networks.layers import Embedded
from trilemma.networks.prior import Prior
from trilemma.networks.text import TextTransformer
from trilemma.networks.transformer import CausalTransformer
from trilemma.networks.vit import VisionTransformer

TEXTS = ["a red square", "a blue square, 7"]
DIM, CONTEXT, WIDTH = 8, 12, 16


def frozen_clip() -> Frozen:
    torch.manual_seed(0)
    image = VisionTransformer((3, 16, 16), patch=8, width=WIDTH, depth=1, heads=2)
    text = TextTransformer(WIDTH, 1, 2, embedding=4, context=CONTEXT)
    return Frozen(CLIP(image, text, dim=DIM))


@pytest.fixture(scope="module")
def clip() -> Frozen:
    return frozen_clip()


def test_embeddings_are_as_wide_as_noise_and_come_back_as_units(clip):
    codec = ClipEmbedding(clip)
    x = codec.encode(torch.rand(5, 3, 16, 16) * 2 - 1)
    assert x.shape == (5, DIM) and torch.allclose(x.square().mean(1), torch.ones(5), atol=1e-5)
    assert torch.allclose(codec.decode(3 * x).norm(dim=1), torch.ones(5))


def test_padding_says_nothing(clip):
    part = ClipText(clip)
    told = part(Condition(2, text=TEXTS))
    assert told.tokens.shape == (2, CONTEXT, WIDTH) and told.vector.shape == (2, DIM)
    assert torch.equal(told.tokens[0, -1], part.padding) and told.tokens.requires_grad
    alone = part(Condition(1, text=TEXTS[:1]))
    assert torch.allclose(alone.tokens, told.tokens[:1], atol=1e-6)
    with pytest.raises(ValueError, match="needs condition.text"):
        part(Condition(2))


def test_what_is_dropped_is_as_what_is_not_said(clip):
    rng = Rng(range(64))
    for part, told, image in (
        (ClipText(clip, dropout=0.5), Condition(64, text=TEXTS * 32), None),
        (ClipImage(clip, 6, dropout=0.5), Condition(64), torch.rand(64, 3, 16, 16) * 2 - 1),
    ):
        torch.nn.init.normal_(next(part.parameters()))
        made, nothing = part(told, rng, image), part.nothing(told)
        dropped = (made.vector == nothing.vector).all(1)
        assert 16 < dropped.sum() < 48
        assert ((made.tokens == nothing.tokens).all(-1).all(-1) == dropped).all()


def test_a_prior_sees_words_time_and_noise():
    network = Prior(DIM, (CONTEXT, WIDTH), width=16, layers=1, heads=2)
    for layer in network.transformer.layers:  # as if trained: attention and perceptron do something
        for last in (layer.out, layer.down):
            torch.nn.init.normal_(last.weight, std=0.3)
    x, time = torch.randn(2, DIM), torch.rand(2)
    told = Embedded(vector=torch.randn(2, DIM), tokens=torch.randn(2, CONTEXT, WIDTH))
    made = network(x, time, told)
    assert made.shape == (2, DIM)
    for other in (
        network(x + 1, time, told),
        network(x, time / 2, told),
        network(x, time, Embedded(vector=told.vector + 1, tokens=told.tokens)),
        network(x, time, Embedded(vector=told.vector, tokens=told.tokens + 1)),
    ):
        assert (made - other).abs().max() > 1e-4
    with pytest.raises(ValueError, match="needs tokens"):
        network(x, time, Embedded(vector=told.vector))


@pytest.fixture
def saying(clip) -> AutoregressivePrior:
    torch.manual_seed(0)
    network = CausalTransformer(16, 1, 2)
    return AutoregressivePrior(ClipEmbedding(clip), ClipText(clip), network, DIM, 64)


def test_a_prior_holds_one_clip(clip):
    prior = AutoregressivePrior(
        ClipEmbedding(clip), ClipText(frozen_clip()), CausalTransformer(16, 1, 2), DIM, 64
    )
    assert prior.conditioner.clip is prior.codec.clip is clip
    other = Frozen(frozen_clip().module, "runs/other")
    with pytest.raises(ValueError, match="embeddings are those of None .* read by runs/other"):
        AutoregressivePrior(ClipEmbedding(clip), ClipText(other), prior.network, DIM, 64)


def test_components_are_principal_and_come_back(saying):
    images = torch.rand(40, 3, 16, 16) * 2 - 1
    saying.measure(images.split(20))
    z = saying.codec.encode(images)
    turned = (z - saying.mean) @ saying.axes
    assert torch.allclose(turned.mean(0), torch.zeros(DIM), atol=1e-4)
    covariance = turned.T @ turned / len(z)
    assert torch.allclose(covariance, covariance.diag().diag(), atol=1e-4)
    assert (covariance.diag().diff() <= 1e-6).all()
    error = (saying.from_codes(saying.codes(z)) - z) @ saying.axes
    assert (error.abs() <= saying.reach / 64 + 1e-5).all()


def test_a_component_depends_on_those_before_it_alone(saying):
    saying.measure([torch.rand(20, 3, 16, 16) * 2 - 1])
    for layer in saying.network.layers:
        torch.nn.init.normal_(layer.out.weight, std=0.5)
    codes = torch.randint(64, (1, DIM))
    told, near = saying._told(Condition(1, text=TEXTS[:1]), None)

    def logits(codes):
        sequence = torch.cat([told, saying._said(codes[:, :-1], 0) + near[:, 1:]], 1)
        return saying.out(saying._features(sequence, 0)[:, told.shape[1] - 1 :])

    other = codes.clone()
    other[0, 3] = (other[0, 3] + 1) % 64
    apart = (logits(codes) - logits(other)).abs().amax(-1)[0]
    assert (apart[:4] == 0).all() and apart[4] > 0


def test_drawing_one_by_one_is_drawing_what_training_learned(saying):
    """With the cache or without, the features are the same; the likeliest is drawn when cold."""
    saying.measure([torch.rand(20, 3, 16, 16) * 2 - 1])
    condition = Condition(2, text=TEXTS)
    z = saying.draw(condition, Rng(range(2)), temperature=1e-4, candidates=1)
    codes = saying.codes(z * DIM**0.5)
    told, near = saying._told(condition, None)
    known = torch.zeros(2, 0, dtype=torch.int64)
    for _ in range(DIM):
        said = saying._said(known, 0) + near[:, 1 : 1 + known.shape[1]]
        sequence = torch.cat([told, said], 1)
        logits = saying.out(saying._features(sequence, 0)[:, -1])
        known = torch.cat([known, logits.argmax(1, keepdim=True)], 1)
    expected = saying.codec.decode(saying.from_codes(known))
    assert torch.allclose(z, expected, atol=1e-5) and codes.shape == (2, DIM)


def test_a_prior_learns_which_picture_belongs_to_which_text(saying):
    torch.manual_seed(1)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    saying.measure([image.repeat(4, 1, 1, 1) + 0.3 * torch.randn(8, 3, 16, 16)])
    batch = Batch(image, Condition(2, text=TEXTS), 0, Rng(range(2)))
    saying.conditioner.dropout = 0
    optimizer = torch.optim.Adam([p for p in saying.parameters() if p.requires_grad], 3e-2)
    for _ in range(60):
        loss = saying.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    drawn = saying.draw(batch.condition, Rng(range(2)), temperature=0.01)
    wanted = torch.nn.functional.normalize(saying.codec.encode(image), dim=1)
    assert ((drawn @ wanted.T).argmax(1) == torch.arange(2)).all()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unclip")
    data = pictures.load(str(tiny.captioned(folder / "data")), size=16)

    def fit(name, out, *changes):
        changes = [*tiny.overrides(name), *changes]
        trilemma.train(name, data, out=folder / out, steps=2, quiet=True, overrides=changes)
        return folder / out

    clip = [f"{folder}/clip"]
    fit("clip", "clip", "model.dim=8")
    fit("clip", "other", "model.dim=8", "train.optimizer.lr=1e-2")
    of = [f"model.diffusion.{part}.clip.path={clip[0]}" for part in ("codec", "conditioner")]
    fit("unclip-prior", "prior", *of, "model.diffusion.network.dim=8")
    of = [f"model.{part}.clip.path={clip[0]}" for part in ("codec", "conditioner")]
    fit("unclip-prior-ar", "saying", *of, "model.components=4")
    fit("unclip-decoder", "decoder", f"model.conditioner.clip.path={clip[0]}")
    fit("unclip-decoder", "stray", f"model.conditioner.clip.path={folder}/other")
    return folder


def test_training_begins_by_taking_the_components(runs):
    saying = sampling.load(runs / "saying", "cpu").model
    data = pictures.load(str(runs / "data"), size=16)
    z = saying.codec.encode(to_float(data.tensor(list(range(len(data))))))
    assert torch.allclose(saying.mean, z.mean(0), atol=1e-4)
    spread = ((z - saying.mean) @ saying.axes).std(0, correction=0)
    assert torch.allclose(4 * spread, saying.reach, atol=1e-4)


@pytest.mark.parametrize("prior", ["prior", "saying"])
def test_joined_it_draws_by_words_and_a_seed_is_a_picture(runs, prior, tmp_path):
    joining.join(runs / prior, runs / "decoder", None, tmp_path / "run")
    trained = sampling.load(tmp_path / "run", "cpu")
    assert trained.reads and trained.draws
    held = [part for part in trained.model.modules() if isinstance(part, CLIP)]
    assert len(held) == 1
    options = {"steps": 2, "prior_steps": 2} if prior == "prior" else {"steps": 2}
    asked = {"text": TEXTS, "seed": 3, **options}
    images = trained.sample(4, **asked)
    assert images.shape == (4, 3, 16, 16)
    apart = trained.sample(4, batch=2, **asked)
    assert (images.int() - apart.int()).abs().max() <= 1
    assert trained.sample(1, text="a red square", direct=True, steps=2).shape[0] == 1


def test_a_prior_that_was_written_with_two_clips_is_opened(runs, tmp_path):
    tensors, facts = checkpoint.read_model(runs / "prior")
    twice = {name: tensor.clone() for name, tensor in tensors.items()}
    checkpoint.write(tmp_path / "model.safetensors", twice, facts)
    size, before = (
        (place / "model.safetensors").stat().st_size for place in (runs / "prior", tmp_path)
    )
    assert size < before
    opened = sampling.load(tmp_path, "cpu").model.state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in tensors.items())


def test_pictures_are_varied_blended_and_changed(runs):
    trained = sampling.load(runs / "decoder", "cpu")
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert variation.variations(trained, images, 3, steps=2).shape == (2, 3, 3, 16, 16)
    way = variation.blend(trained, images[:1], images[1:], 4, steps=2)
    assert way.shape == (1, 4, 3, 16, 16)
    ends = variation.blend(trained, images[:1], images[:1], 2, steps=2)
    assert torch.equal(ends[:, 0], ends[:, 1])
    changed = variation.change(trained, images, "a red square", "a blue square", 3, steps=2)
    assert changed.shape == (2, 3, 3, 16, 16)
    with pytest.raises(UserError, match="the same to CLIP"):
        variation.change(trained, images, "a", "a")


def test_refusals(runs, tmp_path):
    with pytest.raises(UserError, match="different CLIPs"):
        joining.join(runs / "prior", runs / "stray", None, tmp_path / "run")
    with pytest.raises(UserError, match="draws no embeddings"):
        joining.join(runs / "decoder", runs / "decoder", None, tmp_path / "run")
    with pytest.raises(UserError, match="conditioner is ClipImage"):
        joining.join(runs / "prior", runs / "clip", None, tmp_path / "run")
    with pytest.raises(UserError, match="join --prior"):
        sampling.load(runs / "prior", "cpu").sample(1)
    joining.join(runs / "prior", runs / "decoder", None, tmp_path / "run")
    with pytest.raises(UserError, match="holds a run"):
        joining.join(runs / "prior", runs / "decoder", None, tmp_path / "run")
    with pytest.raises(UserError, match="draws nothing of CLIP's embeddings"):
        variation.variations(sampling.load(runs / "clip", "cpu"), torch.zeros(1, 3, 16, 16).byte())
