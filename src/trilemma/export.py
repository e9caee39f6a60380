"""A trained diffusion model as a folder that diffusers loads and draws from, without our code.

What fits is a `networks.unet.UNet` of pixels whose residual blocks are shifted or scaled and
shifted by the time and whose levels are joined by convolutions (the recipe ddpm): it is a
UNet2DModel under other names. Two things are not the same there, and are made so:

- Our step k is time (k + 1) / T, theirs k. An angle one step further is a rotation of its cosine
  and sine, which is linear, so it goes into the first layer of the time embedding.
- Labels are vectors added to the time embedding there as here; the last, one more than the classes,
  is "nothing said".

The scheduler is DDPMScheduler with the schedule's own betas; DDPMPipeline then draws what our
solver ddpm does: `trilemma sample RUN --solver ddpm`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trilemma import checkpoint
from trilemma.codecs import Pixels
from trilemma.conditioning import Labels
from trilemma.diffusion.schedules import Betas
from trilemma.errors import UserError
from trilemma.models.diffusion import Diffusion
from trilemma.networks.layers import GroupNorm
from trilemma.networks.unet import Attention, Level, ResidualBlock, UNet
from trilemma.sampling import Trained

PREDICTIONS = {"noise": "epsilon", "image": "sample", "velocity": "v_prediction"}
FORM = "0.30.0"  # of diffusers' folders: the version from which on they can be read


def to_diffusers(trained: Trained, out: str | Path) -> Path:
    """Write a trained model as a folder of a DDPMPipeline; return the folder.

    Raises:
        UserError: the model has parts that diffusers does not; or `out` holds something else.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists; expected a new or empty folder")
    model = trained.model
    if not isinstance(model, Diffusion):
        raise _unfit(trained, f"it is a {type(model).__name__}, not a Diffusion")
    schedule, network = model.schedule, model.network
    if not isinstance(schedule, Betas):
        raise _unfit(trained, f"its schedule is {type(schedule).__name__}, not one of betas")
    target = trained.recipe["model"].get("target", "noise")
    if target not in PREDICTIONS:
        raise _unfit(trained, f"it predicts the {target}, not noise, image or velocity")
    if not isinstance(network, UNet):
        raise _unfit(trained, f"its network is a {type(network).__name__}, not a UNet")
    if type(model.codec) is not Pixels or model.data_std != 1 or model.learn_variance:
        raise _unfit(trained, "it draws latents, scales its input or learns variances")
    if type(model.conditioner) is not Labels:
        raise _unfit(trained, f"it is told {type(model.conditioner).__name__}, not labels")
    height, width = trained.data["shape"][1:]
    if height % network.multiple or width % network.multiple:
        raise _unfit(trained, f"diffusers cannot halve {height}x{width} as often as it does")
    weights, config = _network(trained, network)
    table = model.conditioner.table
    if table is not None:
        weights["class_embedding.weight"] = table.weight
        config["num_class_embeds"] = len(table.weight)
    config |= {"sample_size": trained.data["shape"][1], "_class_name": "UNet2DModel"}
    config |= {"in_channels": model.codec.shape[0], "out_channels": model.codec.shape[0]}
    betas = -torch.expm1(schedule.log_alpha2.diff())
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule.steps,
        "trained_betas": betas.tolist(),
        "prediction_type": PREDICTIONS[target],
        "variance_type": "fixed_small",
        "clip_sample": True,
        "timestep_spacing": "trailing",
    }
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (out / "unet").mkdir(parents=True, exist_ok=True)
    (out / "scheduler").mkdir(exist_ok=True)
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    temporary = out / "unet" / ".weights.tmp"
    save_file(plain, temporary, metadata={"format": "pt"})
    checkpoint.replace(temporary, out / "unet" / "diffusion_pytorch_model.safetensors")
    for place, told in (
        ("unet/config.json", config),
        ("scheduler/scheduler_config.json", scheduler),
        ("model_index.json", index),
    ):
        told = {"_diffusers_version": FORM, **told}
        (out / place).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return out


def _unfit(trained: Trained, why: str) -> UserError:
    return UserError(
        f"{trained.name} cannot be exported to diffusers: {why}; what can is a model such as the "
        "recipe ddpm's"
    )


def _network(trained: Trained, network: UNet) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a U-Net's weights under diffusers' names, and the config that says what it is."""
    told = trained.recipe["model"]["network"]
    norm_out = network.norm_out
    assert isinstance(norm_out, GroupNorm)
    norms = {module.groups for module in network.modules() if isinstance(module, GroupNorm)}
    blocks, multipliers = told.get("blocks", 2), told.get("multipliers", (1, 2, 2, 2))
    if network.patch != 1 or told.get("resample", "conv") != "conv" or told.get("rescale"):
        raise _unfit(trained, "its U-Net folds pixels, resamples in blocks or rescales sums")
    if len(norms) != 1:
        raise _unfit(
            trained, f"its normalisations are of {sorted(norms)} groups, not of one number"
        )
    if network.embedding_dim != 4 * network.channels:
        raise _unfit(trained, f"its time embedding is {network.embedding_dim} wide, not 4 channels")
    groups = norms.pop()
    weights: dict[str, Tensor] = {}

    def put(name: str, module: torch.nn.Module) -> None:
        for key, tensor in module.state_dict().items():
            weights[f"{name}.{key}"] = tensor

    def level(place: str, i: int, module: Level) -> None:
        block, attention = module.block, module.attention
        assert isinstance(block, ResidualBlock)
        at = f"{place}.resnets.{i}"
        put(f"{at}.norm1", block.norm_in)
        put(f"{at}.conv1", block.conv_in)
        put(f"{at}.time_emb_proj", block.shift)
        put(f"{at}.norm2", block.norm_out)
        put(f"{at}.conv2", block.conv_out)
        put(f"{at}.conv_shortcut", block.skip)
        if isinstance(attention, Attention):
            at = f"{place}.attentions.{0 if place == 'mid_block' else i}"
            put(f"{at}.group_norm", attention.norm)
            put(f"{at}.to_out.0", attention.out)
            for key, tensor in attention.qkv.state_dict().items():
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    weights[f"{at}.to_{letter}.{key}"] = part

    put("conv_in", network.conv_in)
    put("time_embedding.linear_1", network.time[0])
    put("time_embedding.linear_2", network.time[2])
    first = weights["time_embedding.linear_1.weight"]
    weights["time_embedding.linear_1.weight"] = _later(first.double(), network.channels).float()
    attends, depth, i = [], 0, 0
    for module in network.down:
        if isinstance(module, Level):
            level(f"down_blocks.{depth}", i, module)
            attends += [module.attention is not None] if i == 0 else []
            i += 1
        else:
            put(f"down_blocks.{depth}.downsamplers.0.conv", module)
            depth, i = depth + 1, 0
    for i, module in enumerate(network.middle):
        assert isinstance(module, Level)
        level("mid_block", i, module)
    depth = i = 0
    for module in network.up:
        if isinstance(module, Level):
            level(f"up_blocks.{depth}", i, module)
            i += 1
        else:
            put(f"up_blocks.{depth}.upsamplers.0", module)
            depth, i = depth + 1, 0
    put("conv_norm_out", network.norm_out)
    put("conv_out", network.conv_out)
    config = {
        "block_out_channels": [multiplier * network.channels for multiplier in multipliers],
        "layers_per_block": blocks,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": told.get("head_channels"),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": norm_out.eps,
        "resnet_time_scale_shift": {"shift": "default", "scale-shift": "scale_shift"}[
            told.get("norm", "shift")
        ],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    return weights, config


def _later(weight: Tensor, dim: int) -> Tensor:
    """Return W' with W' features(k) = W features(k + 1), for the features of `sinusoidal`."""
    half = dim // 2
    turn = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float64) / half)
    turn = turn.to(weight.device)
    cos, sin = weight[:, :half], weight[:, half:]
    # cos(a + f) = cos a cos f - sin a sin f,  sin(a + f) = cos a sin f + sin a cos f
    return torch.cat(
        [cos * turn.cos() + sin * turn.sin(), sin * turn.cos() - cos * turn.sin()], dim=1
    )
