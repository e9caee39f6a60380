"""Checkpoints fine-tuned on captioned pictures, and what diffusers makes of the result."""

import numpy as np
import pytest
import torch

from rectified import flux_pipeline, sd3_pipeline
from test_rectified import ours
from trilemma.batch import Rng
from trilemma.data.dataset import Dataset
from trilemma.errors import UserError
from trilemma.networks import lora
from trilemma.stable import finetune, flux, sd3
from trilemma.stable.finetune import LORA_FILE, Cache, Tuning, order

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CAPTIONS = ["a red apple", "", "two pears", "a red apple"]


def data(text=CAPTIONS):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    return Dataset("fruit", "train", "fingerprint", images, text=text)


def tune(model, out, **options):
    return list(finetune.finetune(model, data(), out, Tuning(**options), "fp32"))


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline], ids=["sd3", "flux"])
def test_a_lora_is_what_diffusers_reads(make, tmp_path):
    """Every name is one of diffusers' layers, and W + B A there is our merged weight."""
    pipeline = make()
    model = ours(pipeline)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    where = model.diffusers_places()
    losses = tune(model, tmp_path, steps=3, batch=2, rank=2, rate=1e-2, scale=0.5, warm_up=0)
    assert [step for step, _ in losses] == [1, 2, 3]

    factors, alphas = (
        type(pipeline).lora_state_dict(str(tmp_path), return_alphas=True)[:2]
        if make is flux_pipeline
        else (type(pipeline).lora_state_dict(str(tmp_path)), None)
    )
    assert not alphas
    theirs = dict(pipeline.transformer.named_modules())
    layers = {name.rsplit(".lora_", 1)[0].removeprefix("transformer.") for name in factors}
    assert layers and layers <= theirs.keys()
    merged = lora.merged(model.network)
    names = {place.name.removesuffix(".weight"): name for name, place in where.items()}
    moved = 0
    for layer in layers:
        a, b = (factors[f"transformer.{layer}.lora_{each}.weight"] for each in "AB")
        assert a.shape[0] == b.shape[1] == 2
        expected = theirs[layer].weight + b @ a
        torch.testing.assert_close(merged[names[layer]], expected, atol=1e-6, rtol=1e-5)
        moved += int((merged[names[layer]] != before[names[layer]]).any())
    assert moved > len(layers) / 2
    unmoved = set(before) - {names[layer] for layer in layers}
    assert all(torch.equal(merged[name], before[name]) for name in unmoved)


def test_training_lowers_the_loss_of_all_weights(tmp_path):
    torch.manual_seed(0)
    model = ours(sd3_pipeline())
    told = [loss for _, loss in tune(model, tmp_path, steps=30, batch=2, rank=None, rate=3e-3)]
    assert np.mean(told[-8:]) < 0.8 * np.mean(told[:8])
    assert not (tmp_path / LORA_FILE).exists()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 30


@torch.no_grad()
def test_the_cache_holds_what_the_checkpoint_says(tmp_path):
    model = ours(sd3_pipeline())
    pictures = data()
    cache = Cache(tmp_path, model, pictures)
    told, expected = cache.embedded(["two pears", ""]), model.embed(["two pears", ""])
    torch.testing.assert_close(told.vector, expected.vector)
    torch.testing.assert_close(told.tokens, expected.tokens)
    mean, deviation = cache.latents([2, 0])
    image = torch.from_numpy(pictures.images[[2, 0]]).float() / 127.5 - 1
    expected = model.moments(image)
    torch.testing.assert_close(mean, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(deviation, expected[1], atol=1e-5, rtol=1e-4)

    model.embed = model.moments = None  # what is there is not made again
    assert len(Cache(tmp_path, model, pictures)) == 4


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline], ids=["sd3", "flux"])
def test_recomputed_gradients_are_the_same(make):
    model = ours(make())
    text = model.embed(["a red apple"])
    text = type(text)(text.vector.detach(), text.tokens.detach())
    found = []
    for recompute in (False, True):
        model.network.zero_grad()
        model.network.recompute = recompute
        x0 = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        model.loss(x0, text, Rng([1])).sum().backward()
        found.append([p.grad.clone() for p in model.network.parameters() if p.grad is not None])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


def test_the_order_is_one_permutation_after_another():
    taken = order(5, 3, 0, 15)
    assert sorted(taken[:5]) == sorted(taken[5:10]) == list(range(5))
    assert taken[:5] != taken[5:10]
    assert order(5, 3, 7, 4) == taken[7:11]


def test_the_folder_of_a_whole_network_is_diffusers(tmp_path):
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    for make, module, kind in (
        (sd3_pipeline, sd3, SD3Transformer2DModel),
        (flux_pipeline, flux, FluxTransformer2DModel),
    ):
        pipeline = make()
        model = ours(pipeline)
        config = module.from_config(pipeline.transformer.config, "config.json")
        finetune.write_network(tmp_path / kind.__name__, model, module.to_config(config))
        again = kind.from_pretrained(tmp_path / kind.__name__)
        expected = pipeline.transformer.state_dict()
        assert all(torch.equal(again.state_dict()[name], expected[name]) for name in expected)


def test_what_cannot_be_learned_from_is_told(tmp_path):
    model = ours(sd3_pipeline())
    with pytest.raises(UserError, match="fruit has no captions; put NAME.txt"):
        Cache(tmp_path, model, data(None))
    with pytest.raises(UserError, match="no layer of this network is named attn and larger"):
        tune(model, tmp_path, targets=["attn"])
    with pytest.raises(UserError, match="5 steps in a row had no finite loss"):
        model = ours(sd3_pipeline())
        model.network.leave.weight.data.fill_(float("nan"))
        tune(model, tmp_path / "nan", rank=2)
    with pytest.raises(ValueError, match="batch 0"):
        Tuning(batch=0)
