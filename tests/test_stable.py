"""Stable Diffusion without its peers: files, names, schedule, tiles, LoRA, errors."""

import json
import pickle
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from trilemma.diffusion.schedules import Quadratic
from trilemma.errors import UserError
from trilemma.networks import kl_autoencoder
from trilemma.networks.kl_autoencoder import KLAutoencoder
from trilemma.networks.layers import Embedded, GroupNorm
from trilemma.networks.spatial_unet import SpatialUNet
from trilemma.networks.tiny_autoencoder import TinyAutoencoder
from trilemma.stable import configs, drawing, files, keys, load, loading, lora, places, schedule

SMALL = {"channels": (32, 64), "blocks": 1, "transformers": (1, 0), "text_dim": 16, "heads": (4, 4)}


def test_unet_of_odd_size():
    unet = SpatialUNet(**SMALL)
    text = Embedded(tokens=torch.randn(2, 7, 16))
    out = unet(torch.randn(2, 4, 9, 6), torch.full((2,), 0.5), text)
    assert out.shape == (2, 4, 9, 6)


def test_unet_names():
    pairs = {
        "input_blocks.0.0.weight": "conv_in.weight",
        "input_blocks.1.0.in_layers.2.weight": "down_blocks.0.resnets.0.conv1.weight",
        "input_blocks.2.1.proj_in.bias": "down_blocks.0.attentions.1.proj_in.bias",
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
        "middle_block.0.emb_layers.1.bias": "mid_block.resnets.0.time_emb_proj.bias",
        "middle_block.1.norm.weight": "mid_block.attentions.0.norm.weight",
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
        "output_blocks.5.1.norm.weight": "up_blocks.1.attentions.2.norm.weight",
        "label_emb.0.2.bias": "add_embedding.linear_2.bias",
        "out.2.weight": "conv_out.weight",
    }
    assert {theirs: keys.unet_name(theirs, 2) for theirs in pairs} == pairs


def test_times_lead_trail_and_spread():
    at = schedule.Spacing(Quadratic(1000, 0.00085, 0.012))
    steps = (at.times("ddim", 4) * 1000 - 1).round().tolist()
    assert steps == [751, 501, 251, 1, 0]
    assert (at.times("euler", 4) * 1000 - 1).round().tolist() == [751, 501, 251, 1, -1]
    assert (at.times("dpmpp_2m", 4) * 1000 - 1).round().tolist() == [801, 601, 401, 201, -1]
    trailing = schedule.Spacing(at.schedule, spacing="trailing", whole=True)
    assert (trailing.times("ddim", 4) * 1000 - 1).round().tolist() == [999, 749, 499, 249, -1]
    with pytest.raises(UserError, match="1 to 1000"):
        at.times("ddim", 1001)


@pytest.mark.parametrize("channels", [(8, 16, 16), (16, 8, 8)])
@pytest.mark.parametrize(
    ("size", "rows"), [((24, 20), 1), ((24, 20), 6), ((9, 31), 4), ((3, 4), 9)]
)
def test_bands_change_nothing(monkeypatch, size, rows, channels):
    """Decoded in bands, a picture is the same to 1e-5: no seams, whatever the bands' height."""
    torch.manual_seed(0)
    monkeypatch.setattr(kl_autoencoder, "BAND", rows * size[1] * 16)
    coder = KLAutoencoder(channels, 1, groups=4).eval()
    for norm in coder.modules():
        if isinstance(norm, GroupNorm):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
    latent = torch.randn(2, 4, *size) * 5 + 1
    with torch.inference_mode():
        whole, bands = coder.decode(latent), coder.decode(latent, bands=True)
    assert whole.shape == (2, 3, 4 * size[0], 4 * size[1])
    assert (whole - bands).abs().max() < 1e-5 * whole.abs().max()


class Alive(TorchDispatchMode):
    """Counts the bytes of results that are alive at once; `most` of them."""

    def __init__(self):
        super().__init__()
        self.tensors, self.now, self.most = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            storage = made.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            if not self.tensors[place]:
                self.now += size
                self.most = max(self.most, self.now)
            self.tensors[place] += 1
            weakref.finalize(made, self.gone, place, size)
        return made

    def gone(self, place, size):
        self.tensors[place] -= 1
        if not self.tensors[place]:
            self.now -= size


def test_bands_hold_little_more_than_the_largest_map(monkeypatch):
    monkeypatch.setattr(kl_autoencoder, "BAND", 1 << 8)
    decoder = KLAutoencoder((16, 32), 1, groups=4, attention=False).decoder
    largest = 32 * 64**2 * 4
    for decode, least, most in ((decoder.rest, 2, 4), (decoder.rest_in_bands, 1, 1.7)):
        with torch.no_grad(), Alive() as alive:
            decode(torch.randn(1, 32, 32, 32))
        assert least * largest < alive.most < most * largest


def test_weights_are_views_of_the_file(tmp_path):
    network = torch.nn.Linear(64, 64)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    tensors, _ = files.read(tmp_path / "a.safetensors")
    with torch.device("meta"):
        empty = torch.nn.Linear(64, 64)
    filled = loading.fill(empty, tensors, "a", torch.device("cpu"), torch.float32)
    assert filled.weight.data_ptr() == tensors["weight"].data_ptr()
    torch.testing.assert_close(filled.weight, network.weight)


def test_a_unet_of_float32_is_views_of_the_file(tmp_path):
    network = SpatialUNet(**SMALL)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    tensors, _ = files.read(tmp_path / "a.safetensors")
    filled = load.unet(SMALL, tensors, "a", torch.device("cpu"), torch.float32)
    for name, weight in filled.named_parameters():
        assert weight.data_ptr() == tensors[name].data_ptr()


def test_convolutions_are_laid_out_anew_and_the_rest_of_the_file_stays_readable(tmp_path):
    network = torch.nn.Conv2d(64, 64, 3)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    tensors, _ = files.read(tmp_path / "a.safetensors")
    with torch.device("meta"):
        empty = torch.nn.Conv2d(64, 64, 3)
    filled = loading.fill(empty, tensors, "a", torch.device("cpu"), torch.float32)
    assert filled.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(filled.weight, network.weight)
    torch.testing.assert_close(tensors["weight"], network.weight)  # let go, and read again


def test_misfits_are_named():
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    given = {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)}
    with pytest.raises(UserError) as told:
        files.check_fit(own, given, "x.safetensors")
    for part in ("x.safetensors", "1 missing: c", "1 unknown: d", "b (4,) for (3,)"):
        assert part in str(told.value)
    with pytest.raises(UserError, match="1 not of floating point, as if quantised: a"):
        files.check_fit({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int8)}, "x")


@pytest.mark.parametrize("name", ["sd.ckpt", "sd.safetensors", "old.bin"])
def test_pickles_are_refused_unopened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    assert load.recognises(tmp_path / name) or name.endswith(".bin")
    with pytest.raises(UserError, match="is a pickle"):
        load.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_torch_archives_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match="is a pickle"):
        load.load(tmp_path / "sd.safetensors")


def test_files_cut_short_are_told(tmp_path):
    path = tmp_path / "sd.safetensors"
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short or damaged"):
        load.load(path)
    path.write_bytes(b"\0" * 200)
    with pytest.raises(UserError, match="cannot be read as a safetensors"):
        load.load(path)


def test_other_files_are_told(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=r"no U-Net .*model\.diffusion_model"):
        load.load(tmp_path / "sd.safetensors")


def test_unknown_pipelines_are_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    assert load.recognises(tmp_path)
    with pytest.raises(UserError, match="KandinskyPipeline, which is not known"):
        load.load(tmp_path)


def test_a_run_is_no_checkpoint(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"trilemma": "{}"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert not load.recognises(path)
        with pytest.raises(UserError, match="no checkpoint from elsewhere; .*train RECIPE --init"):
            load.load(path)
    with pytest.raises(UserError, match="does not exist; expected a diffusers folder or"):
        load.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"_class_name": "UNet3D"}, "of a UNet3D"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
        ({"down_block_types": ["KDownBlock2D"] * 4}, "KDownBlock2D"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
    ],
)
def test_unknown_unets_are_named(change, told):
    with pytest.raises(UserError, match=told):
        configs.unet(change, "unet")


def test_an_index_cannot_point_elsewhere(tmp_path):
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lies outside"):
        files.weights(tmp_path)


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        files.weights(tmp_path)


def test_weights_of_loras_are_read(tmp_path):
    assert lora.split("style.safetensors") == (type(tmp_path)("style.safetensors"), 1.0)
    assert lora.split("style.safetensors:-0.5") == (type(tmp_path)("style.safetensors"), -0.5)
    with pytest.raises(UserError, match="expected FILE or FILE:WEIGHT"):
        lora.split("style.safetensors:much")


def test_damaged_loras_are_named(tmp_path):
    layer = torch.nn.Linear(8, 8)
    down, up, path = torch.ones(2, 8), torch.ones(8, 2), tmp_path / "a.safetensors"

    def change(**parts):
        save_file({f"x.{name}": tensor for name, tensor in parts.items()}, path)
        lora.change(str(path), {"x": [(layer, places.Place("x"))]}, lambda name: name)

    def named(down, up):
        return {"lora_down.weight": down, "lora_up.weight": up}

    change(**named(down, up))
    for parts, told in (
        ({}, "holds nothing"),
        (named(torch.ones(3, 8), up), r"are \(8, 2\) and \(3, 8\), which do not fit each other"),
        (named(torch.ones(0, 8), torch.ones(8, 0)), "do not fit each other"),
        (named(torch.ones(()), up), "do not fit each other"),
        ({**named(down, up), "alpha": torch.ones(2)}, "or their alpha"),
        (named(torch.ones(2, 9), up), "made for another model"),
    ):
        with pytest.raises(UserError, match=told):
            change(**parts)
    assert lora._flat("lora_unet_middle_block_9_x", 2) == "lora_unet_middle_block_9_x"
    for asked in (f"{path}:nan", f"{path}:inf"):
        with pytest.raises(UserError, match="expected FILE or FILE:WEIGHT"):
            lora.split(asked)


def test_pictures_and_masks_are_read_as_those_to_train_on(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert drawing.read_image(tmp_path / "turned.jpg", None, 8).shape == (1, 3, 32, 16)
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "dark.png")
    assert drawing.read_image(tmp_path / "dark.png", None, 8).max() < -0.9  # of 65535
    square, black = tmp_path / "square.png", tmp_path / "black.png"
    Image.new("L", (16, 16), 255).save(square)
    Image.new("L", (16, 32)).save(black)
    with pytest.raises(UserError, match="make it 16 x 32, or of these proportions"):
        drawing.check_mask(square, tmp_path / "turned.jpg")
    with pytest.raises(UserError, match="hides nothing"):
        drawing.check_mask(black, tmp_path / "turned.jpg")


def test_layers_of_loras_have_one_name_in_all_layouts():
    ours = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    for name in (
        ours,
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ):
        assert lora._flat(name, 2) == ours
    middle = "lora_unet_middle_block_0_in_layers_2"
    assert lora._flat(middle, 2) == "lora_unet_mid_block_resnets_0_conv1"
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    assert lora._flat("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 2) == text


def test_tiny_autoencoder_halves_eightfold():
    coder = TinyAutoencoder(8, encoder=(1, 1, 1, 1), decoder=(1, 1, 1, 1))
    image = torch.rand(1, 3, 32, 40) * 2 - 1
    latent = coder.encode(image)
    assert latent.shape == (1, 4, 4, 5)
    assert coder.decode(latent).shape == image.shape
