"""Texts: the conditioner, the networks that attend to them, sampling by words, guidance by CLIP."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tiny
from trilemma import checkpoint, cli, redraw, sampling, training
from trilemma.batch import Condition, Rng
from trilemma.codecs import Pixels
from trilemma.conditioning import Labels, Pretrained, Text, Together, reads_text
from trilemma.diffusion.guidance import Guidance
from trilemma.diffusion.resemblance import cut, resemblance
from trilemma.diffusion.schedules import Straight
from trilemma.errors import UserError
from trilemma.models.diffusion import Diffusion
from trilemma.networks.dit import DiT
from trilemma.networks.layers import CrossAttention, Embedded
from trilemma.networks.quick_unet import QuickUNet
from trilemma.networks.text import TextTransformer
from trilemma.networks.unet import UNet

DIM = 32
NETWORKS = {
    "quick-unet": lambda: QuickUNet(3, 3, 16, (16, 24), (1, 1), DIM, heads=4, cross=True),
    "unet": lambda: UNet(
        3, 3, 32, (1, 1), 1, (8,), size=16, head_channels=8, embedding_dim=DIM, cross=True
    ),
    **{
        kind: (lambda kind=kind: DiT(3, 3, 16, 4, 16, 2, 2, conditioning=kind, embedding_dim=DIM))
        for kind in ("in-context", "cross-attention", "adaln-cross")
    },
}


def woken(network):
    """Return a network without the zeros it starts with, which would hide everything."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def encoder(**options):
    torch.manual_seed(0)
    options = {"width": 16, "depth": 1, "heads": 2, "embedding": 8, "context": 10, **options}
    return TextTransformer(**options)


def words(**options):
    return Text(DIM, encoder(), **options)


# Networks


def test_masked_tokens_are_not_seen():
    torch.manual_seed(0)
    layer = CrossAttention(16, DIM, 2)
    x, tokens = torch.randn(2, 5, 16), torch.randn(2, 4, DIM)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    made = layer(x, tokens, mask)
    torch.testing.assert_close(made[:1], layer(x[:1], tokens[:1, :2]))
    torch.testing.assert_close(made[1:], layer(x[1:], tokens[1:, :3]))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_hear_tokens_and_not_the_padding(name):
    network = woken(NETWORKS[name]()).eval()
    x, time = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.7])
    tokens = torch.randn(2, 6, DIM)
    mask = torch.arange(6) < torch.tensor([[4], [2]])
    said = network(x, time, Embedded(tokens=tokens, mask=mask))
    noise = torch.where(mask[:, :, None], tokens, torch.randn(2, 6, DIM))
    torch.testing.assert_close(said, network(x, time, Embedded(tokens=noise, mask=mask)))
    short = network(x, time, Embedded(tokens=tokens[:, :4], mask=mask[:, :4]))
    torch.testing.assert_close(said, short, rtol=1e-4, atol=1e-5)
    other = network(x, time, Embedded(tokens=tokens.flip(0), mask=mask))
    assert (said - other).abs().max() > 1e-4


def test_tokens_that_nobody_would_read_are_refused():
    x, time, tokens = torch.randn(1, 3, 16, 16), torch.rand(1), torch.randn(1, 2, DIM)
    for network in (
        QuickUNet(3, 3, 16, (16, 24), (1, 1), DIM),
        UNet(3, 3, 32, (1,), 1, (), size=16, embedding_dim=DIM),
        DiT(3, 3, 16, 4, 16, 1, 2, embedding_dim=DIM),
    ):
        with pytest.raises(ValueError, match="cross"):
            network(x, time, Embedded(tokens=tokens))
    for name in ("quick-unet", "unet", "adaln-cross"):
        with pytest.raises(ValueError, match="tokens"):
            NETWORKS[name]()(x, time)
    with pytest.raises(ValueError, match="needs heads"):
        QuickUNet(3, 3, 16, (16, 24), (1, 1), DIM, cross=True)


# The conditioner


def test_text_is_embedded_as_tokens_and_a_vector():
    part = words()
    made = part(Condition(2, text=["red apple", "a"]))
    assert made.vector.shape == (2, DIM) and made.tokens.shape == (2, 10, DIM)
    assert made.mask.sum(1).tolist() == [4, 3]  # with start and end
    alone = part(Condition(1, text=["a"]))
    torch.testing.assert_close(alone.tokens[0][alone.mask[0]], made.tokens[1][made.mask[1]])
    nothing = part.nothing(Condition(2))
    torch.testing.assert_close(nothing.vector, part(Condition(2, text=["", ""])).vector)
    assert words(tokens=False)(Condition(1, text=["a"])).tokens is None


def test_captions_are_dropped_by_each_pictures_own_stream():
    part = words(dropout=0.5)
    told = Condition(64, text=["red apple"] * 64)
    made = part(told, Rng(range(64))).vector
    nothing = part.nothing(Condition(1)).vector
    dropped = torch.isclose(made, nothing, atol=1e-6).all(1)
    assert 16 < dropped.sum() < 48
    half = part(told[32:], Rng(range(64))[32:]).vector
    torch.testing.assert_close(half, made[32:])


def test_what_does_not_fit_is_explained():
    with pytest.raises(ValueError, match="dropout 0"):
        words(dropout=0.0)(Condition(1))
    with pytest.raises(ValueError, match="1 texts were given for 2 pictures"):
        words()(Condition(2, text=["a"]))


def test_labels_and_text_together():
    part = Together([Labels(3, DIM), words()])
    made = part(Condition(2, torch.tensor([0, 1]), text=["a", "b"]))
    assert made.tokens.shape == (2, 10, DIM) and made.mask.shape == (2, 10)
    assert reads_text(part) and not reads_text(Labels(3, DIM))


def model():
    network = woken(NETWORKS["quick-unet"]())
    return Diffusion(
        Pixels((3, 16, 16)), network, words(), schedule=Straight(), target="straight"
    ).eval()


def test_a_negative_text_takes_the_place_of_nothing():
    drawing, rng = model(), Rng(range(2))
    x, told = rng.normal(3, 16, 16), Condition(2, text=["red apple", "blue"])
    plain = drawing.denoiser(told, 3.0)(x, 0.5)
    empty = drawing.denoiser(told, Guidance(3.0, negative=""))(x, 0.5)
    torch.testing.assert_close(plain, empty)
    away = drawing.denoiser(told, Guidance(3.0, negative="green"))(x, 0.5)
    given = drawing.denoise(x, 0.5, drawing.conditioner(told))
    without = drawing.denoise(x, 0.5, drawing.conditioner(Condition(2, text=["green"] * 2)))
    expected = (without + 3 * (given - without)).clamp(-1, 1)
    torch.testing.assert_close(away, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="above 1"):
        Guidance(1.0, negative="green")


def test_pretrained_encoders_are_read_and_their_features_kept(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    part = Text(DIM, Pretrained(str(tmp_path), context=6))
    made = part(Condition(2, text=["red apple", "red"]))
    assert made.tokens.shape == (2, 6, DIM) and made.mask.sum(1).tolist() == [4, 3]
    assert set(part.encoder._known) == {"red apple", "red"}
    assert not [name for name, _ in part.named_parameters() if name.startswith("encoder")]
    again = part(Condition(1, text=["red"]))
    torch.testing.assert_close(again.vector[0], made.vector[1])
    with pytest.raises(UserError, match="no config.json"):
        Pretrained(str(tmp_path / "nowhere"))


# Training and sampling


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tiny.captioned(tmp_path_factory.mktemp("pictures"))
    out = tmp_path_factory.mktemp("runs") / "text"
    changes = [*tiny.overrides("text-diffusion"), "train.grids=1"]
    training.train("text-diffusion", folder, out=out, steps=2, overrides=changes, quiet=True)
    return out


def test_grids_show_captions_of_the_data(run):
    trained = sampling.load(run)
    assert any(text.startswith("class0 number") for text in trained.data["captions"])
    (sheet,) = (run / "samples").glob("*.png")
    assert Image.open(sheet).width > 8 * 96  # enlarged, to make room for words
    first = trained.data["captions"][0]
    drawn = trained.sample(2, steps=2)
    assert torch.equal(drawn[:1], trained.sample(1, text=first, steps=2))


def test_texts_in_turn_and_one_stream_a_picture(run):
    trained = sampling.load(run)
    torch.manual_seed(0)
    for parameter in trained.model.parameters():  # two steps have taught it to hear nothing yet
        parameter += 0.1 * torch.randn(parameter.shape)
    drawn = trained.sample(4, text=["a red square", "a blue square"], steps=2)
    alone = trained.sample(1, seed=3, text="a blue square", steps=2).int()
    assert (alone - drawn[3:].int()).abs().max() <= 2
    assert not torch.equal(drawn, trained.sample(4, text="a red square", steps=2))
    with pytest.raises(UserError, match="at least one"):
        trained.sample(1, text=[])
    with pytest.warns(UserWarning, match="cut to 8 tokens"):
        trained.sample(1, text="red " * 40, steps=1)


def test_from_the_command_line(run, tmp_path, monkeypatch, capsys):
    def call(*arguments, code=0):
        words = ["sample", run, "--steps", 2, "--json", "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr("sys.argv", ["trilemma", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr()
        assert bool(stop.value.code) == bool(code)
        return told.err if code else json.loads(told.out)["images"]

    (tmp_path / "more.txt").write_text("a green square\n\na blue square\n")
    asked = ["--text", "a red square", "--text-file", tmp_path / "more.txt"]
    paths = call(*asked, "--negative", "green", "--guidance", 4)
    assert len(paths) == 3
    text = Image.open(paths[2]).text
    told = json.loads(text["trilemma"])
    assert told["text"] == "a blue square" and told["sample"]["negative"] == "green"
    assert text["parameters"].startswith("a blue square\nNegative prompt: green\nSteps: 2")
    assert len(call("--text", "a red square")) == 16
    assert "guidance above 1" in call("--negative", "x", "--guidance", 1, code=1)
    told = call("--text-file", tmp_path / "nowhere.txt", code=2)
    assert "nowhere.txt" in re.sub(r"[\s│]", "", told)  # whatever the width of the screen


def test_pictures_are_changed_by_words(run, tmp_path):
    trained = sampling.load(run)
    torch.manual_seed(0)
    for parameter in trained.model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    images = torch.full((2, 3, 16, 16), 99, dtype=torch.uint8)
    options = {"steps": 2, "guidance": 3.0}
    both = redraw.vary(trained, images, 0.9, 2, text=["a red", "a blue"], **options).int()
    blue = redraw.vary(trained, images[1:], 0.9, 1, seed=3, text="a blue", **options).int()
    red = redraw.vary(trained, images[1:], 0.9, 1, seed=3, text="a red", **options).int()
    assert (both[1, 1] - blue[0, 0]).abs().max() <= 2 < (blue - red).abs().max()
    # The recipe's guidance holds where something is said, and none where nothing is.
    assert redraw.told(trained, {}, None, "a red")["guidance"] == 3.0
    assert redraw.told(trained, {}, None)["guidance"] == 1.0
    away = redraw.vary(trained, images[1:], 0.9, 1, seed=3, negative="a red", steps=2)
    assert not torch.equal(away, redraw.vary(trained, images[1:], 0.9, 1, seed=3, steps=2))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, 8:] = True
    options = {"steps": 2, "resample": 1}
    one, two = (redraw.inpaint(trained, images, mask, text=t, **options) for t in ("a", "b"))
    assert not torch.equal(one, two) and torch.equal(one[..., :8], two[..., :8])
    one, two = (redraw.outpaint(trained, images, (0, 0, 0, 4), text=t, **options) for t in "ab")
    assert not torch.equal(one, two)


def test_words_for_changes_from_the_command_line(run, tmp_path, monkeypatch, capsys):
    pictures = tiny.pictures(tmp_path / "pictures", 2, 1)

    def call(*arguments, code=0):
        words = ["edit", *arguments, "--steps", 2, "--json", "--out", tmp_path / "out"]
        monkeypatch.setattr("sys.argv", ["trilemma", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        told = capsys.readouterr()
        assert bool(stop.value.code) == bool(code)
        if code:
            return told.err
        return json.loads(Image.open(json.loads(told.out)["images"][0]).text["trilemma"])

    words = ["--text", "a red square", "--negative", "green", "--guidance", 2]
    facts = call("vary", run, pictures, "-n", 1, *words)
    assert facts["text"] == ["a red square"] and facts["sample"]["negative"] == "green"
    facts = call("outpaint", run, pictures, "--top", 4, "--resample", 1, *words)
    assert facts["text"] == ["a red square"] and facts["sample"]["guidance"] == 2
    again = ["--negative", "x", "--guidance", 1]
    assert "guidance above 1" in call("vary", run, pictures, *again, code=1)
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    assert "sample" in call("vary", tmp_path / "sd", pictures, "--text", "x", code=1)


def test_what_is_cut_off_a_text_is_told_without_code(run, tmp_path, monkeypatch, capsys):
    words = ["sample", run, "-n", 1, "--steps", 1, "--out", tmp_path, "--text", "red " * 200]
    monkeypatch.setattr("sys.argv", ["trilemma", *map(str, words)])
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        warnings.simplefilter("always")
        cli.main()
    told = capsys.readouterr().err
    assert "warning: texts are cut to 8 tokens: 'red red" in told and ".py" not in told


def test_packaged_models_are_found_by_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PACKAGED", tmp_path)
    tensors, facts = checkpoint.read_model(run)
    halves = {key: value.half() for key, value in tensors.items()}
    checkpoint.write(tmp_path / "small.safetensors", halves, facts)
    loaded, whole = sampling.load("small"), sampling.load(run)
    assert next(loaded.model.parameters()).dtype == torch.float32
    drawn, again = (each.sample(2, text="a red square", steps=2).int() for each in (whole, loaded))
    assert (drawn - again).abs().max() <= 2
    with pytest.raises(UserError, match="does not exist"):
        sampling.load("smaller")


def test_models_and_data_without_words_are_told_apart(tmp_path):
    folder = tiny.pictures(tmp_path / "pictures")
    changes, out = tiny.overrides("text-diffusion"), tmp_path / "a"
    with pytest.raises(UserError, match="has none; expected metadata"):
        training.train("text-diffusion", folder, out=out, overrides=changes, steps=1, quiet=True)
    changes = tiny.overrides("quick-diffusion")
    trained = training.train(
        "quick-diffusion", folder, out=tmp_path / "b", overrides=changes, steps=1, quiet=True
    )
    with pytest.raises(UserError, match="reads no text; it takes a label"):
        trained.sample(1, text="red")
    with pytest.raises(ValueError, match="negative text.*reads no texts"):
        trained.sample(1, negative="red", guidance=2.0)
    images = trained.sample(1, steps=1)
    with pytest.raises(UserError, match="reads no text; it takes a label"):
        redraw.vary(trained, images, text="red")


# Guidance by CLIP


class Colours(nn.Module):
    """Stands for CLIP: a picture is its mean colour, a text one of three."""

    def embed_images(self, image: Tensor) -> Tensor:
        return nn.functional.normalize(image.mean((2, 3)) + 1.01, dim=1)

    def embed_texts(self, text: list[str]) -> Tensor:
        return torch.eye(3)[[("red", "green", "blue").index(word) for word in text]]


def test_crops_lie_inside_and_differ_from_call_to_call():
    ramp = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16)
    views = cut(ramp, 5, 0)
    assert views.shape == (10, 3, 16, 16)
    torch.testing.assert_close(views[:2], ramp)
    inside = views[:, :, 1:-1, 1:-1]
    assert inside.min() > -1 and inside.max() < 1
    assert torch.equal(views, cut(ramp, 5, 0)) and not torch.equal(views, cut(ramp, 5, 1))


def test_clip_leads_each_picture_to_its_own_text():
    drawing = Diffusion(
        Pixels((3, 16, 16)), woken(QuickUNet(3, 3, 16, (16, 24), (1, 1), DIM)), schedule=Straight(),
        target="straight",
    ).eval()  # fmt: skip
    told = Condition(2, text=["red", "blue"])
    options = {"solver": "euler", "steps": 4}
    asked = Guidance(clip=Colours(), clip_scale=30.0, crops=3)
    plain = drawing.sample(told, Rng(range(2)), **options).mean((2, 3))
    led = drawing.sample(told, Rng(range(2)), guidance=asked, **options).mean((2, 3))
    assert led[0, 0] > plain[0, 0] and led[0, 2] < plain[0, 2]
    assert led[1, 2] > plain[1, 2] and led[1, 0] < plain[1, 0]
    alone = drawing.sample(told[1:], Rng([1]), guidance=asked, **options).mean((2, 3))
    torch.testing.assert_close(alone, led[1:], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="towards a text"):
        resemblance(Colours(), Condition(1), 2)
    with pytest.raises(ValueError, match="at least 1"):
        resemblance(Colours(), told, 0)
