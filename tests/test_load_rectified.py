"""Files of Stable Diffusion 3 and FLUX.1; whole pipelines against diffusers'; what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from rectified import clip_tokenizer, flux_pipeline, sd3_pipeline, single_file
from trilemma.batch import Rng
from trilemma.errors import UserError
from trilemma.stable import load, text

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TEXTS = ["a red apple", "two green pears"]
SEEDS = [3, 4]
PIPELINES = {
    "sd3": sd3_pipeline,
    "sd3.5": lambda: sd3_pipeline(medium35=True),
    "dev": flux_pipeline,
    "schnell": lambda: flux_pipeline(guided=False),
}
GUIDED = {
    "sd3": (
        {"guidance_scale": 5.0, "negative_prompt": ["blue"] * 2},
        {"negative": "blue", "guidance": 5.0},
    ),
    "dev": ({"guidance_scale": 2.0}, {"guidance": 2.0}),
    "schnell": (
        {"true_cfg_scale": 3.0, "negative_prompt": ["blue"] * 2},
        {"true_guidance": 3.0, "negative": "blue"},
    ),
}
GUIDED["sd3.5"] = GUIDED["sd3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each pipeline of diffusers and the folder it is saved in."""
    made = {}
    for name, make in PIPELINES.items():
        pipeline, folder = make(), tmp_path_factory.mktemp("diffusers") / name
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder)
        made[name] = pipeline, folder
    return made


def opened(path, **options):
    return load.load(path, "cpu", precision="fp32", **options)


def assert_close(ours, theirs):
    """Ours in [-1, 1] and theirs in [0, 1] to 1e-4 of the latter."""
    assert theirs.std() > 0.05
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-4, rtol=0)


def noise(name):
    start = Rng(SEEDS).normal(16, 8, 12)
    if name.startswith("sd3"):
        return start
    return (
        start.unflatten(2, (4, 2))
        .unflatten(4, (6, 2))
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(1, 2)
        .flatten(2)
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_a_folder_draws_what_diffusers_draws(saved, name):
    pipeline, folder = saved[name]
    theirs, ours = GUIDED[name]
    size = {"height": 16, "width": 24}
    expected = pipeline(
        TEXTS, latents=noise(name), num_inference_steps=3, output_type="pt", **size, **theirs
    ).images
    assert_close(opened(folder).draw(TEXTS, Rng(SEEDS), steps=3, **size, **ours), expected)


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize("name", ["sd3", "dev"])
def test_pictures_from_a_picture_are_those_of_diffusers(saved, name, masked, monkeypatch):
    import diffusers

    pipeline, folder = saved[name]
    theirs, ours = GUIDED[name]
    family = "StableDiffusion3" if name == "sd3" else "Flux"
    kind = getattr(diffusers, f"{family}{'Inpaint' if masked else 'Img2Img'}Pipeline")
    own = Rng(SEEDS)

    def drawn(shape, generator=None, device=None, dtype=None, layout=None):
        made = own.normal(16, 8, 12)
        return made[: shape[0]]

    import diffusers.models.autoencoders.vae as vae_module

    for module in (vae_module, __import__(kind.__module__, fromlist=["randn_tensor"])):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    if masked:  # diffusers draws the same latents of a picture again for its mask
        options = {"mask_image": torch.zeros(1, 1, 16, 24)}
        options["mask_image"][:, :, :, 8:] = 1
    else:
        options = {}
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(5))
    made = kind(**{k: v for k, v in pipeline.components.items() if v is not None})
    made.set_progress_bar_config(disable=True)
    expected = made(
        TEXTS,
        image=picture.expand(2, -1, -1, -1),
        strength=0.7,
        num_inference_steps=4,
        height=16,
        width=24,
        output_type="latent" if name == "sd3" else "pt",
        **options,
        **theirs,
    ).images
    if name == "sd3":  # whose painting forgets the shift when it decodes
        latents = expected / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        with torch.no_grad():
            expected = (pipeline.vae.decode(latents).sample.clamp(-1, 1) + 1) / 2
    mask = options.get("mask_image")
    pictures = opened(folder).draw(
        TEXTS, Rng(SEEDS), image=2 * picture - 1, mask=mask, strength=0.7, steps=4, **ours
    )
    assert_close(pictures, expected)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_single_file_draws_what_its_folder_draws(saved, name, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "own_tokenizer", lambda pad: clip_tokenizer())
    pipeline, folder = saved[name]
    save_file(single_file(pipeline), tmp_path / "whole.safetensors")
    own = single_file(pipeline, only_transformer=True)
    save_file(own, tmp_path / "transformer.safetensors")
    given = {"steps": 2, "height": 16, "width": 24}
    if name == "dev":
        given["guidance"] = 2.0
    expected = opened(folder).draw(TEXTS, Rng(SEEDS), **given)
    for file in ("whole", "transformer"):
        model = opened(tmp_path / f"{file}.safetensors", parts=folder)
        assert model.size == 1024
        assert model.shift.at(1000) == opened(folder).shift.at(1000)
        torch.testing.assert_close(
            model.draw(TEXTS, Rng(SEEDS), **given), expected, atol=1e-5, rtol=0
        )


def test_sd3_without_t5(saved, tmp_path):
    pipeline, _ = saved["sd3"]
    small = sd3_pipeline(t5=False)
    small.set_progress_bar_config(disable=True)
    small.save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    start = Rng(SEEDS).normal(16, 8, 8)
    expected = small(TEXTS, latents=start, num_inference_steps=2, output_type="pt", **size).images
    assert_close(opened(tmp_path).draw(TEXTS, Rng(SEEDS), steps=2, **size), expected)


def test_weights_stay_views_of_the_file(saved):
    model = opened(saved["dev"][1])
    names = [
        name for name, _ in model.network.named_parameters() if "modulation.linear" not in name
    ]
    spans = load.loading._mapped()
    for name in names:
        at = model.network.get_parameter(name).data_ptr()
        assert any(first <= at < after for first, after in spans), name


@pytest.fixture
def damaged(saved, tmp_path):
    """A function that copies a folder to be damaged."""

    def copy(name):
        return shutil.copytree(saved[name][1], tmp_path / name)

    return copy


def change(path, edit):
    told = json.loads(path.read_text())
    edit(told)
    path.write_text(json.dumps(told))


def test_what_is_wrong_with_a_folder_is_named(damaged):
    folder = damaged("dev")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load.files.read(weights)[0]
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    kept = tensors.pop("single_transformer_blocks.1.attn.to_k.weight")
    save_file(tensors | {"lora.weight": kept}, weights)
    with pytest.raises(
        UserError,
        match=r"1 missing: single_\w+\.1\.attn\.to_k\.weight; 1 unknown: lora\.weight",
    ):
        opened(folder)
    save_file(
        tensors | {"single_transformer_blocks.1.attn.to_k.weight": kept[:, :3].clone()}, weights
    )
    with pytest.raises(
        UserError, match=r"of another shape: singles\.1\.attention\.k\.weight \(64, 3\)"
    ):
        opened(folder)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut short or damaged"):
        opened(folder)
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="is a pickle"):
        opened(folder)


def test_a_folder_without_a_part_is_named(damaged):
    folder = damaged("dev")
    change(folder / "scheduler" / "scheduler_config.json", lambda c: c.update(invert_sigmas=True))
    with pytest.raises(UserError, match="has invert_sigmas True"):
        opened(folder)
    change(folder / "scheduler" / "scheduler_config.json", lambda c: c.update(invert_sigmas=False))
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(UserError, match="tokenizer_2 holds no tokenizer"):
        opened(folder)
    change(folder / "transformer" / "config.json", lambda c: c.pop("num_layers"))
    with pytest.raises(UserError, match="config.json lacks 'num_layers'"):
        opened(folder)


def test_what_a_single_file_lacks_is_named(saved, tmp_path):
    own = single_file(saved["dev"][0], only_transformer=True)
    save_file(own, tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"holds no autoencoder .* give a diffusers folder .* parts=FOLDER"
    ):
        opened(tmp_path / "a.safetensors")
    del own["img_in.weight"]
    save_file(own, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="holds no img_in.weight: it is not complete"):
        opened(tmp_path / "b.safetensors")


def test_options_that_do_not_fit_are_refused(saved):
    model = opened(saved["schnell"][1])

    def draw(**options):
        return model.draw(TEXTS, Rng(SEEDS), **{"height": 16, "width": 16} | options)

    with pytest.raises(UserError, match="24x18: both must be multiples of 4"):
        draw(height=18, width=24)
    with pytest.raises(UserError, match="guidance is 3.5, and this model is told none"):
        draw(guidance=3.5)
    with pytest.raises(UserError, match="give true_guidance above 1 besides"):
        draw(negative="blue")
    with pytest.raises(UserError, match="steps is 0"):
        draw(steps=0)
    with pytest.raises(UserError, match="a mask was given without an image"):
        draw(mask=torch.ones(1, 1, 16, 16))
    with pytest.raises(UserError, match="strength is 0"):
        draw(image=torch.zeros(1, 3, 16, 16), strength=0)
    with pytest.raises(UserError, match="solver 'eule' is not known"):
        draw(solver="eule")


def test_a_lora_in_either_layout_changes_the_same_weights(saved, tmp_path):
    torch.manual_seed(0)
    down, ups = torch.randn(2, 64), torch.randn(3, 64, 2)
    theirs, at = {}, "transformer.transformer_blocks.0.attn"
    for up, each in zip(ups, "qkv", strict=True):
        theirs[f"{at}.to_{each}.lora_A.weight"] = down.clone()
        theirs[f"{at}.to_{each}.lora_B.weight"] = up.clone()
    save_file(theirs, tmp_path / "diffusers.safetensors")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    original = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": ups.flatten(0, 1),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(original, tmp_path / "kohya.safetensors")
    folder = saved["dev"][1]
    plain = opened(folder).network.doubles[0].image.attention.k.weight
    for file in ("diffusers", "kohya"):
        model = opened(folder, loras=[f"{tmp_path / file}.safetensors:0.5"])
        changed = model.network.doubles[0].image.attention
        torch.testing.assert_close(changed.k.weight, plain + 0.5 * ups[1] @ down)
    with pytest.raises(UserError, match="changes 3 parts that this checkpoint lacks"):
        wrong = {k.replace("blocks.0", "blocks.7"): v for k, v in theirs.items()}
        save_file(wrong, tmp_path / "wrong.safetensors")
        opened(folder, loras=[str(tmp_path / "wrong.safetensors")])


def test_the_command_line_draws_from_a_folder(saved, tmp_path):
    from PIL import Image
    from typer.testing import CliRunner

    from trilemma.cli import app

    asked = ["sample", str(saved["schnell"][1]), "--text", "a pear", "--size", "24x16", "-n", "2"]
    asked += ["--steps", "1", "--seed", "3", "--out", str(tmp_path), "--device", "cpu"]
    asked += ["--option", "precision=fp32"]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    pictures = [Image.open(tmp_path / f"0000{i}.png") for i in range(2)]
    assert [picture.size for picture in pictures] == [(24, 16)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert "Sampler: euler, CFG scale: 1.0, Seed: 4" in pictures[1].text["parameters"]


@pytest.mark.parametrize("name", ["sd3.5", "dev"])
def test_half_precision_is_near(saved, name):
    folder, given = saved[name][1], {"steps": 2, "height": 16, "width": 24}
    half = load.load(folder, "cpu", precision="bf16")
    assert half.network.text.weight.dtype == torch.bfloat16
    drawn = half.draw(TEXTS, Rng(SEEDS), **given)
    assert drawn.dtype == torch.float32
    exact = opened(folder).draw(TEXTS, Rng(SEEDS), **given)
    assert (drawn - exact).square().mean().sqrt() < 0.1 * exact.std()
