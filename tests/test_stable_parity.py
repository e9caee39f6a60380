"""Stable Diffusion against diffusers and transformers: the same weights, the same noise."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import stable_tiny as tiny  # noqa: E402
from trilemma.batch import Rng  # noqa: E402
from trilemma.errors import UserError  # noqa: E402
from trilemma.stable import files, load, text  # noqa: E402

pytestmark = pytest.mark.slow

SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"set_alpha_to_one": False, "clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
}
TEXTS, NEGATIVE = ["a red apple", "two shoes"], "blurred"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a pipeline of each version and the folder that it is saved in."""
    made = {}

    def get(version, channels=4, prediction="epsilon"):
        key = version, channels, prediction
        if key not in made:
            folder = tmp_path_factory.mktemp("sd")
            pipe = tiny.pipeline(version, channels, prediction)
            pipe.save_pretrained(folder, safe_serialization=True)
            made[key] = pipe, folder
        return made[key]

    return get


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < tolerance


def scheduled(pipe, name, **told):
    kind, own = SCHEDULERS[name]
    pipe.scheduler = kind(
        **tiny.SCALED, **tiny.LEADING, **own, prediction_type=pipe.scheduler.config.prediction_type,
        **told,
    )  # fmt: skip
    return pipe


@pytest.mark.parametrize(
    ("version", "prediction"), [("1", "epsilon"), ("2", "v_prediction"), ("XL", "epsilon")]
)
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_text_to_image(saved, monkeypatch, version, prediction, solver):
    pipe, folder = saved(version, prediction=prediction)
    stable = load.load(folder, "cpu", precision="fp32")
    options = {"guidance": 5.0, "steps": 4, "solver": solver}
    ours = stable.draw(TEXTS, Rng([3, 4]), negative=NEGATIVE, **options)
    theirs = tiny.draw_theirs(
        scheduled(pipe, solver), monkeypatch, [3, 4], prompt=TEXTS,
        negative_prompt=[NEGATIVE] * 2, guidance_scale=5.0, num_inference_steps=4,
        height=32, width=32,
    )  # fmt: skip
    close(ours, theirs)


def picture(seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear")


def a_mask():
    mask = torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:24, 6:32] = 1
    return mask


def like(pipe, kind):
    """Return another pipeline of the same parts."""
    return kind(**pipe.components, **({} if "XL" in kind.__name__ else OLD))


OLD = {"requires_safety_checker": False}


@pytest.mark.parametrize("version", ["1", "XL"])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_image_to_image(saved, monkeypatch, version, solver):
    pipe, folder = saved(version)
    kind = {
        "1": diffusers.StableDiffusionImg2ImgPipeline,
        "XL": diffusers.StableDiffusionXLImg2ImgPipeline,
    }[version]
    stable = load.load(folder, "cpu", precision="fp32")
    options = {"guidance": 5.0, "steps": 5, "solver": solver, "strength": 0.6}
    ours = stable.draw(TEXTS[:1], Rng([3]), negative=NEGATIVE, image=picture(), **options)
    theirs = tiny.draw_theirs(
        scheduled(like(pipe, kind), solver), monkeypatch, [3], prompt=TEXTS[:1],
        negative_prompt=[NEGATIVE], guidance_scale=5.0, num_inference_steps=5, strength=0.6,
        image=(picture() + 1) / 2,
    )  # fmt: skip
    close(ours, theirs)


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_inpainting(saved, monkeypatch, channels, strength, solver):
    pipe, folder = saved("1", channels)
    stable = load.load(folder, "cpu", precision="fp32")
    options = {"guidance": 5.0, "steps": 5, "solver": solver, "strength": strength}
    options |= {"image": picture(), "mask": a_mask(), "negative": NEGATIVE}
    ours = stable.draw(TEXTS[:1], Rng([3]), **options)
    theirs = tiny.draw_theirs(
        scheduled(like(pipe, diffusers.StableDiffusionInpaintPipeline), solver), monkeypatch, [3],
        prompt=TEXTS[:1], negative_prompt=[NEGATIVE], guidance_scale=5.0, num_inference_steps=5,
        strength=strength, image=(picture() + 1) / 2, mask_image=a_mask(), height=32, width=32,
    )  # fmt: skip
    close(ours, theirs)


def test_xl_without_a_negative_text(saved, monkeypatch):
    pipe, folder = saved("XL")
    stable = load.load(folder, "cpu", precision="fp32")
    ours = stable.draw(TEXTS[:1], Rng([3]), guidance=5.0, steps=3, solver="euler")
    theirs = tiny.draw_theirs(
        scheduled(pipe, "euler"), monkeypatch, [3], prompt=TEXTS[:1], guidance_scale=5.0,
        num_inference_steps=3, height=32, width=32,
    )  # fmt: skip
    close(ours, theirs)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_spacings(saved, monkeypatch, spacing, solver):
    pipe, folder = saved("1")
    told = {"timestep_spacing": spacing, "steps_offset": 0}
    kind, own = SCHEDULERS[solver]
    own = own | {"set_alpha_to_one": True} if solver == "ddim" else own
    if (spacing, solver) == ("linspace", "ddim"):
        pytest.skip("diffusers steps to another level than that of the next step there")
    pipe.scheduler = kind(**tiny.SCALED, **told, **own)
    stable = load.load(folder, "cpu", precision="fp32")
    at = load.from_config(dict(pipe.scheduler.config), "config")
    stable = dataclasses.replace(stable, spacing=at)
    ours = stable.draw(TEXTS[:1], Rng([3]), guidance=5.0, steps=4, solver=solver)
    theirs = tiny.draw_theirs(
        pipe, monkeypatch, [3], prompt=TEXTS[:1], guidance_scale=5.0, num_inference_steps=4,
        height=32, width=32,
    )  # fmt: skip
    close(ours, theirs)


def test_a_picture_depends_on_its_seed_alone(saved):
    stable = load.load(saved("1")[1], "cpu", precision="fp32")
    options = {"steps": 3, "guidance": 3.0}
    both = stable.draw([TEXTS[0]] * 2, Rng([7, 8]), **options)
    one = stable.draw([TEXTS[0]], Rng([8]), **options)
    close(both[1:], one, 1e-5)


def test_long_texts_are_read_in_pieces(saved):
    pipe, folder = saved("1")
    reader = load.load(folder, "cpu", precision="fp32").reader
    words = "abcdefghij" * 12  # 120 tokens, one for each letter
    told = reader([words, "x"]).tokens
    assert told.shape == (2, 2 * 77, 64)
    for i in range(2):
        ids = reader.towers[0].tokenizer(words, add_special_tokens=False).input_ids
        ids = ids[75 * i : 75 * i + 75]
        end = reader.towers[0].tokenizer.eos_token_id
        row = torch.tensor([[514 - 2, *ids, *[end] * (76 - len(ids))]])
        theirs = pipe.text_encoder(row).last_hidden_state
        close(told[:1, 77 * i : 77 * i + 77], theirs, 1e-5)


@pytest.mark.parametrize("version", ["1", "2", "XL"])
@pytest.mark.parametrize("half", [False, True])
def test_single_files_draw_what_folders_do(tmp_path, version, half):
    prediction = "v_prediction" if version == "2" else "epsilon"
    pipe = tiny.pipeline(version, prediction=prediction, vocabulary=49408)
    pipe.tokenizer = text.own_tokenizer("!" if version == "2" else "<|endoftext|>")
    if version == "XL":
        pipe.tokenizer_2 = text.own_tokenizer("!")
        pipe.vae.register_to_config(scaling_factor=0.13025)
    if half:
        pipe.to(torch.float16)
    pipe.save_pretrained(
        tmp_path / "folder", safe_serialization=True, variant="fp16" * half or None
    )
    save_file(tiny.single(pipe, version), tmp_path / "single.safetensors")
    drawn = [
        load.load(tmp_path / name, "cpu", precision="fp32").draw(
            TEXTS[:1], Rng([3]), negative=NEGATIVE, steps=3, solver="ddim", height=32, width=32
        )
        for name in ("folder", "single.safetensors")
    ]
    close(*drawn, 1e-6)


def test_names_of_single_files_are_those_that_diffusers_knows():
    from diffusers.loaders import single_file_utils as theirs

    pipe = tiny.pipeline("XL")
    unet = theirs.convert_ldm_unet_checkpoint(tiny.single(pipe, "XL"), dict(pipe.unet.config))
    assert unet.keys() == pipe.unet.state_dict().keys()
    coder = theirs.convert_ldm_vae_checkpoint(tiny.single(pipe, "XL"), dict(pipe.vae.config))
    assert coder.keys() == pipe.vae.state_dict().keys()


def test_the_packaged_vocabulary_is_clips():
    own = text.own_tokenizer()
    told = own("a photo of a cat").input_ids
    assert told == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_tokenizers_of_two_files_are_read(tmp_path):
    own = text.own_tokenizer()
    model = json.loads(own.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    told = {"pad_token": "!", "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    read = text.tokenizer(tmp_path)
    words = "Don't stop! 42 cafés, naïve xylophonists"
    assert read(words).input_ids == text.own_tokenizer("!")(words).input_ids
    assert read.pad_token_id == 0


def lora_of(pipe, layers, rank=3):
    """Return (down, up) of some layers, drawn."""
    torch.manual_seed(1)
    made = {}
    for name in layers:
        weight = pipe.unet.get_submodule(name).weight
        down = torch.randn(rank, *weight.shape[1:]) * 0.1
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2)) * 0.1
        made[name] = down, up
    return made


LAYERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.proj_in",
]


def write_lora(path, layout, parts, alpha=2.0):
    tensors = {}
    for name, (down, up) in parts.items():
        if layout == "kohya":
            flat = "lora_unet_" + name.replace(".", "_")
            names = f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"
        elif layout == "original":
            (full,) = tiny.original_unet({name + ".weight": down})
            full = full.removeprefix("model.diffusion_model.").removesuffix(".weight")
            flat = "lora_unet_" + full.replace(".", "_")
            names = f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"
        else:
            names = f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight", f"unet.{name}.alpha"
        for key, tensor in zip(names, (down, up, torch.tensor(alpha)), strict=True):
            tensors[key] = tensor
    save_file(tensors, path)


@pytest.mark.parametrize("layout", ["kohya", "original", "peft"])
def test_lora(saved, tmp_path, layout):
    """Each layout changes the weights as its formula says: W + weight alpha / r up down."""
    pipe, folder = saved("1")
    parts = lora_of(pipe, LAYERS)
    write_lora(tmp_path / "a.safetensors", layout, parts)
    asked = f"{tmp_path / 'a.safetensors'}:0.5"
    stable = load.load(folder, "cpu", precision="fp32", loras=[asked])
    for name, (down, up) in parts.items():
        own = pipe.unet.get_submodule(name).weight
        change = (up.flatten(1) @ down.flatten(1)).view_as(own) * 0.5 * 2 / 3
        close(stable.unet.get_submodule(name).weight, own + change, 1e-6)
    again = load.load(folder, "cpu", precision="fp32")  # the file was not written to
    first = (network.get_submodule(LAYERS[0]).weight for network in (again.unet, pipe.unet))
    assert torch.equal(*first)


def test_lora_of_another_model_is_refused(saved, tmp_path):
    save_file({"lora_unet_other.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="made for another model"):
        load.load(saved("1")[1], "cpu", loras=[str(tmp_path / "a.safetensors")])
    save_file({"lora_unet_x.hada_w1_a": torch.zeros(1, 1)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"hada_w1_a, which belongs to no LoRA"):
        load.load(saved("1")[1], "cpu", loras=[str(tmp_path / "b.safetensors")])


def test_tiny_autoencoder(saved, tmp_path):
    torch.manual_seed(0)
    width, blocks = 16, (1, 1)
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(width,) * 2, decoder_block_out_channels=(width,) * 2,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    stable = load.load(saved("1")[1], "cpu", precision="fp32")
    ours = load.tiny(tmp_path, stable)
    latent = torch.randn(1, 4, 8, 8) * 2
    with torch.inference_mode():
        close(ours.decode(latent), theirs.decode(latent).sample, 1e-5)
        image = picture()
        close(ours.encode(image), theirs.encode(image).latents, 1e-5)


def test_command(saved, tmp_path):
    from typer.testing import CliRunner

    from trilemma.cli import app

    Image.new("RGB", (37, 40), (200, 30, 40)).save(tmp_path / "in.png")
    out = tmp_path / "out"
    asked = ["sample", str(saved("1")[1]), "--text", "apple", "--negative", "pear", "-n", "2"]
    asked += ["--image", str(tmp_path / "in.png"), "--strength", "0.5", "--steps", "4"]
    asked += ["--out", str(out), "--seed", "5", "--option", "precision=fp32", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    with Image.open(out / "00001.png") as drawn:
        assert drawn.size == (36, 40)
        facts = json.loads(drawn.text["trilemma"])
        assert drawn.text["parameters"].startswith("apple\nNegative prompt: pear\nSteps: 4")
    assert facts["seed"] == 6 and facts["text"] == "apple"
    assert facts["sample"]["strength"] == 0.5
    assert (out / "grid.png").exists()


def test_a_folder_without_its_tokenizer_is_told(saved, tmp_path):
    shutil.copytree(saved("1")[1], tmp_path / "sd")
    for path in (tmp_path / "sd" / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="tokenizer holds no tokenizer; expected vocab.json"):
        load.load(tmp_path / "sd", "cpu")
    unet = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(saved("1")[1] / "tokenizer", tmp_path / "sd" / "tokenizer", dirs_exist_ok=True)
    tensors = files.read(unet)[0]
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name != "conv_in.bias"}
    unet.unlink()
    save_file(kept, unet)
    with pytest.raises(UserError, match=r"unet does not fit its network: 1 missing: conv_in\.bias"):
        load.load(tmp_path / "sd", "cpu")
