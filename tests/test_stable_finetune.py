"""Checkpoints fine-tuned on captioned pictures, and what diffusers makes of the result."""

import numpy as np
import pytest
import torch

from rectified import flux_pipeline, sd3_pipeline
from test_rectified import AGAINST, TEXTS, draw, noise, ours
from trilemma.batch import Rng
from trilemma.data.dataset import Dataset
from trilemma.errors import Interrupted, UserError
from trilemma.networks import lora
from trilemma.networks.kl_autoencoder import KLAutoencoder
from trilemma.stable import finetune, flux, sd3
from trilemma.stable.finetune import LORA_FILE, Tuning, order
from trilemma.stable.tunable import Cache

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


def test_diffusers_draws_with_our_lora_of_stable_diffusion_3_what_we_draw(tmp_path):
    pytest.importorskip("peft")
    pipeline = sd3_pipeline()
    model = ours(pipeline)
    before = draw(model, noise(), 2, AGAINST, guidance=5.0)
    tune(model, tmp_path, steps=3, batch=2, rank=2, rate=0.05, warm_up=0)
    pipeline.load_lora_weights(str(tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    told = {"height": 16, "width": 24, "num_inference_steps": 2, "guidance_scale": 5.0}
    told |= {"negative_prompt": [AGAINST] * 2, "output_type": "latent"}
    theirs = pipeline(TEXTS, latents=noise(), **told).images
    after = draw(model, noise(), 2, AGAINST, guidance=5.0)
    assert (after - theirs).abs().max() < 1e-4
    assert (after - before).abs().max() > 1e-2


def test_training_lowers_the_loss_of_all_weights(tmp_path):
    torch.manual_seed(0)
    model = ours(sd3_pipeline())
    model.autoencoder.scale /= 100  # a random one makes latents too large to learn soon
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
    with pytest.raises(UserError, match="no layer of this network is named novel and larger"):
        tune(model, tmp_path, targets=["novel"])
    with pytest.raises(UserError, match="5 steps in a row had no finite loss"):
        model = ours(sd3_pipeline())
        model.network.leave.weight.data.fill_(float("nan"))
        tune(model, tmp_path / "nan", rank=2)
    with pytest.raises(ValueError, match="batch 0"):
        Tuning(batch=0)
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a number above 0, such as 1e-4"):
            Tuning(rate=rate)
    with pytest.raises(ValueError, match="seed is 2147483648"):
        Tuning(seed=1 << 31)


def test_a_checkpoint_is_never_overwritten(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    for out, told in (
        ("one", "is the checkpoint itself"),
        ("one/in", "or in it"),
        ("two", "holds"),
    ):
        with pytest.raises(UserError, match=told):
            next(finetune.tune(tmp_path / "one", tmp_path, tmp_path / out, Tuning(rank=None)))


@pytest.mark.parametrize("rank", [2, None], ids=["lora", "full"])
def test_a_resumed_fine_tuning_is_the_uninterrupted_one(rank, tmp_path):
    options = {"batch": 2, "rank": rank, "rate": 1e-2, "warm_up": 3}
    whole = ours(sd3_pipeline())
    losses = tune(whole, tmp_path / "whole", steps=5, **options)
    told = []
    for steps in (2, 5):
        model = ours(sd3_pipeline())
        told += list(
            finetune.finetune(
                model, data(), tmp_path / "parts", Tuning(steps=steps, **options), "fp32",
                resume=steps == 5,
            )
        )  # fmt: skip
    assert told == losses
    expected = whole.network.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in model.network.state_dict().items())
    lines = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_a_fine_tuning_killed_after_a_save_goes_on_from_it(tmp_path, monkeypatch):
    """What came after the last state, in the log too, is done again."""
    whole = tune(ours(sd3_pipeline()), tmp_path / "whole", steps=4, rank=2)
    model, tuning = ours(sd3_pipeline()), Tuning(steps=4, rank=2)
    steps = finetune.finetune(model, data(), tmp_path / "out", tuning, "fp32", save_every=0)
    next(steps)
    monkeypatch.setattr(finetune, "_save_state", lambda *_: None)
    next(steps), next(steps)  # two more, without a state of them
    steps.close()
    monkeypatch.undo()
    again = finetune.finetune(
        ours(sd3_pipeline()), data(), tmp_path / "out", tuning, "fp32", resume=True
    )
    assert list(again) == whole[1:]
    assert (tmp_path / "out" / "log.jsonl").read_text().count("step") == 4
    files = [(tmp_path / name / LORA_FILE).read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]


def test_a_signal_saves_and_stops(tmp_path):
    import os
    import signal

    tuning = Tuning(steps=4, rank=2)
    steps = finetune.finetune(ours(sd3_pipeline()), data(), tmp_path, tuning, "fp32")
    next(steps)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 2; the state is saved"):
        next(steps)
    again = finetune.finetune(ours(sd3_pipeline()), data(), tmp_path, tuning, "fp32", resume=True)
    assert [step for step, _ in again] == [3, 4]


def test_a_state_of_something_else_is_told(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        tuning = Tuning(rank=2)
        list(finetune.finetune(ours(sd3_pipeline()), data(), tmp_path, tuning, resume=True))
    tune(ours(sd3_pipeline()), tmp_path, steps=1, rank=2)
    with pytest.raises(UserError, match="already holds a fine-tuning; add --resume"):
        tune(ours(sd3_pipeline()), tmp_path, steps=1, rank=2)
    with pytest.raises(UserError, match="was begun with another tuning"):
        tuning = Tuning(steps=2, rank=3)
        list(finetune.finetune(ours(sd3_pipeline()), data(), tmp_path, tuning, "fp32", resume=True))


@pytest.fixture
def pictures(tmp_path):
    """A folder of captioned pictures."""
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(data().images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i])
    return folder


@pytest.mark.parametrize("version", ["1", "XL"])
def test_a_lora_of_stable_diffusion_from_the_command_line(version, pictures, tmp_path):
    """What is learned changes pictures in our sampler as the merged weights do in diffusers."""
    from typer.testing import CliRunner

    import stable_tiny
    from trilemma.cli import app
    from trilemma.stable import load

    pipeline, folder = stable_tiny.pipeline(version), tmp_path / "sd"
    pipeline.save_pretrained(folder)
    asked = ["finetune", str(folder), "--data", str(pictures), "--out", str(tmp_path / "out")]
    asked += ["--rank", "2", "--steps", "2", "--rate", "0.05", "--size", "16", "--batch", "2"]
    asked += ["--device", "cpu", "--precision", "fp32", "--json"]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    file = tmp_path / "out" / LORA_FILE
    learned = file.read_bytes()
    again = CliRunner().invoke(app, [*asked, "--resume"], catch_exceptions=False)
    assert again.exit_code == 0 and file.read_bytes() == learned  # it was at its end
    plain = load.load(folder, "cpu", precision="fp32")
    tuned = load.load(folder, "cpu", precision="fp32", loras=[str(file)])
    told = type(pipeline).lora_state_dict(str(tmp_path / "out"))[0]
    layers = {name.rsplit(".lora_", 1)[0].removeprefix("unet.") for name in told}
    assert layers <= dict(pipeline.unet.named_modules()).keys()
    moved = 0
    for layer in layers:
        a, b = (told[f"unet.{layer}.lora_{each}.weight"] for each in "AB")
        expected = pipeline.unet.get_submodule(layer).weight + b @ a
        found = tuned.unet.get_submodule(layer).weight
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        moved += int((found != plain.unet.get_submodule(layer).weight).any())
    assert moved > len(layers) / 2
    given = {"steps": 2, "height": 16, "width": 16}
    one, other = (m.draw(["a pear"], Rng([1]), **given) for m in (plain, tuned))
    assert (one - other).abs().max() > 1e-4


def theirs_drawn(pipeline, monkeypatch):
    """Return diffusers' picture of a pear."""
    import stable_tiny

    told = {"guidance_scale": 5.0, "num_inference_steps": 2, "height": 16, "width": 16}
    return stable_tiny.draw_theirs(pipeline, monkeypatch, [1], prompt=["a pear"], **told)


def ours_drawn(folder, loras=()):
    from trilemma.stable import load

    stable = load.load(folder, "cpu", precision="fp32", loras=[str(each) for each in loras])
    given = {"steps": 2, "guidance": 5.0, "solver": "ddim", "height": 16, "width": 16}
    return stable.draw(["a pear"], Rng([1]), **given)


def test_diffusers_draws_with_our_lora_what_we_draw(pictures, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    import stable_tiny

    pipeline, folder = stable_tiny.pipeline("1"), tmp_path / "sd"
    pipeline.save_pretrained(folder)
    tuning = Tuning(steps=3, batch=2, rank=2, rate=0.05, warm_up=0)
    given = {"size": 16, "device_name": "cpu", "precision": "fp32"}
    list(finetune.tune(folder, pictures, tmp_path / "out", tuning, **given))
    file = tmp_path / "out" / LORA_FILE
    pipeline.load_lora_weights(str(file.parent))
    drawn = ours_drawn(folder, [file])
    assert (drawn - theirs_drawn(pipeline, monkeypatch)).abs().max() < 1e-4
    assert (drawn - ours_drawn(folder)).abs().max() > 1e-2


def test_we_draw_with_a_lora_of_peft_what_diffusers_draws(tmp_path, monkeypatch):
    """Of U-Net and text encoder, with an alpha that is not the rank."""
    peft = pytest.importorskip("peft")
    import stable_tiny

    pipeline, folder = stable_tiny.pipeline("1"), tmp_path / "sd"
    pipeline.save_pretrained(folder)
    told = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}  # drawn, so that they act
    unet = peft.LoraConfig(target_modules=["to_q", "to_v", "proj_in", "conv1"], **told)
    words = peft.LoraConfig(target_modules=["q_proj", "out_proj"], **told)
    torch.manual_seed(0)
    layers = {}
    for part, config in (("unet", unet), ("text_encoder", words)):
        module = getattr(pipeline, part)
        peft.inject_adapter_in_model(config, module)
        layers[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(module)
        layers[f"{part}_lora_adapter_metadata"] = config.to_dict()
    pipeline.save_lora_weights(str(tmp_path), **layers)
    drawn = ours_drawn(folder, [tmp_path / LORA_FILE])
    assert (drawn - theirs_drawn(pipeline, monkeypatch)).abs().max() < 1e-4
    assert (drawn - ours_drawn(folder)).abs().max() > 1e-2


def test_all_weights_of_stable_diffusion_learn_and_diffusers_reads_them(pictures, tmp_path):
    from diffusers import StableDiffusionPipeline

    import stable_tiny
    from trilemma.stable import load

    first = stable_tiny.pipeline("1")
    first.save_pretrained(tmp_path / "sd")
    tuning = Tuning(steps=1, batch=2, rank=None, rate=1e-3, warm_up=0)
    given = {"size": 16, "device_name": "cpu", "precision": "fp32"}
    list(finetune.tune(tmp_path / "sd", pictures, tmp_path / "out", tuning, **given))
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    before, after = first.unet.state_dict(), theirs.unet.state_dict()
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.9 * len(before)
    ours = load.load(tmp_path / "out", "cpu", precision="fp32").unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in ours.items())
    again = load.load(tmp_path / "sd", "cpu", precision="fp32").unet.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in again.items())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_of_stable_diffusion_is_0_where_its_target_is_said(prediction):
    from trilemma.diffusion.schedules import Quadratic
    from trilemma.stable.schedule import Spacing
    from trilemma.stable.tunable import TunableUNet

    class Stable:
        paints, unet, autoencoder = False, None, KLAutoencoder((32,), groups=32)
        spacing = Spacing(Quadratic(), prediction)

        def _numbers(self, size, count, guided):
            return None

    x0 = torch.randn(3, 4, 8, 8)

    def oracle(x, time, text, numbers):
        alpha, sigma = (v.float()[:, None, None, None] for v in Stable.spacing.schedule(time))
        noise = (x - alpha * x0) / sigma
        sought = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
        return sought[prediction]

    Stable.unet = staticmethod(oracle)
    losses = TunableUNet(Stable()).loss(x0, None, Rng([1, 2, 3]))
    assert losses.shape == (3,) and losses.max() < 1e-4


def test_the_loss_of_rectified_flow_is_0_where_its_target_is_said():
    model = ours(flux_pipeline())
    x0 = torch.randn(2, 16, 8, 8)

    class Oracle:
        patch, guided = 2, True

        def __call__(self, x, time, text, guidance):
            assert torch.equal(guidance, torch.ones(2))
            return (x - x0) / time[:, None, None, None]

    model.network = Oracle()
    assert model.loss(x0, None, Rng([1, 2])).max() < 1e-4


def test_all_weights_of_a_single_file_are_refused(tmp_path):
    with pytest.raises(
        UserError, match="is one file; all weights can be fine-tuned of a diffusers"
    ):
        next(finetune.tune(tmp_path / "a.safetensors", "x", tmp_path, Tuning(rank=None)))


def test_each_step_is_of_one_size(tmp_path):
    """Of two sizes, each batch has one, and what is learned is that of the pictures it names."""
    model, seen = ours(sd3_pipeline()), []
    draw = np.random.default_rng(0)
    sets = []
    for n, h, w in ((3, 16, 16), (5, 8, 32)):
        images = draw.integers(0, 256, (n, 3, h, w), np.uint8)
        texts = [f"a {i}" for i in range(n)]
        sets.append(Dataset("fruit", "train", f"of {h}x{w}", images, text=texts))
    loss = model.loss

    def watched(x0, text, rng):
        seen.append(tuple(x0.shape))
        return loss(x0, text, rng)

    model.loss = watched
    tuning = Tuning(steps=8, batch=2, rank=2)
    told = list(finetune.finetune(model, sets, tmp_path, tuning, "fp32"))
    assert all(np.isfinite(loss) for _, loss in told)
    shapes = {shape[2:] for shape in seen}
    assert len(shapes) == 2 and {shape[0] for shape in seen} == {2}
    assert sum(h != w for _, _, h, w in seen) == 5  # in 8 steps of 2, all of the 8 were seen twice
    cache = Cache(tmp_path, model, sets)
    image = torch.from_numpy(sets[1].images[[4, 1]]).float() / 127.5 - 1
    with torch.no_grad():
        mean, _ = model.moments(image)
        torch.testing.assert_close(cache.latents([4, 1], 1)[0], mean, atol=1e-4, rtol=1e-4)
