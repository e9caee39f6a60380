"""A trained diffusion model as a folder that diffusers loads and draws from, without our code.

What diffusers has a class for can be written:

| it draws | network | schedule | diffusers' pipeline and scheduler |
|---|---|---|---|
| pixels | `networks.unet.UNet` | betas | DDPMPipeline, DDPMScheduler |
| pixels | `networks.unet.UNet` | straight | DDPMPipeline, FlowMatchEulerDiscreteScheduler |
| latents | `networks.unet.UNet` | betas | LDMPipeline, DDIMScheduler |
| latents | `networks.dit.DiT` | betas | DiTPipeline, DDIMScheduler |

The U-Net's residual blocks are shifted or scaled and shifted by the time and its levels are joined
by convolutions (the recipe ddpm); the DiT is adaln-zero, with `inclusive`; the latents are those of
`networks.kl_autoencoder`. Along straight paths the network sees its input as it is
(`scale_input = false`), for no scheduler of diffusers brings it to unit variance. All are the same
under other names, but for this:

- Our step k is time (k + 1) / 1000, theirs k. An angle one step further is a rotation of its cosine
  and sine, which is linear, so it goes into the first layer of the time embedding.
- Labels are vectors added to the time embedding there as here; the last, one more than the classes,
  is "nothing said"; DiTPipeline takes the 1,001st for it.
- Latents are brought to mean 0 and deviation 1 here. The deviation is their `scaling_factor`, the
  mean is in the biases of the convolutions of 1 x 1 around the latents.

DDPMPipeline draws what our solvers ddpm and euler do, the others what ddim does, on the grid
trailing: `trilemma sample RUN --solver ddim --grid trailing`. Straight paths in pixels are the same
as long as no prediction leaves [-1, 1], where ours are clipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilemma import checkpoint
from trilemma.codecs import Latents, Pixels
from trilemma.conditioning import Labels
from trilemma.diffusion.schedules import Betas, Straight
from trilemma.errors import UserError
from trilemma.models.diffusion import Diffusion
from trilemma.models.first_stage import CALM, AutoencoderKL
from trilemma.networks.dit import DiT
from trilemma.networks.kl_autoencoder import StageDecoder, StageEncoder
from trilemma.networks.layers import GroupNorm, TimeEmbedding
from trilemma.networks.unet import Attention, Level, ResidualBlock, UNet
from trilemma.sampling import Trained

PREDICTIONS = {"noise": "epsilon", "image": "sample", "velocity": "v_prediction"}
FORM = "0.30.0"  # of diffusers' folders: the version from which on they can be read
STEPS = 1000  # of the times that networks there are told
CLASSES = 1000  # of DiTPipeline


@dataclass(frozen=True)
class Part:
    """A part of a pipeline: its class, its weights by name, the config that says how it is made."""

    kind: str
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]


def to_diffusers(trained: Trained, out: str | Path) -> Path:
    """Write a trained model as a folder of a pipeline of diffusers; return the folder.

    Raises:
        UserError: the model has parts that diffusers does not; or `out` holds something else.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists; expected a new or empty folder")
    model = trained.model
    if not isinstance(model, Diffusion):
        raise _unfit(trained, f"it is a {type(model).__name__}, not a Diffusion")
    if type(model.conditioner) is not Labels:
        raise _unfit(trained, f"it is told {type(model.conditioner).__name__}, not labels")
    if model.data_std != 1 or model.learn_variance:
        raise _unfit(trained, "it scales its target or learns variances")
    scheduler = _scheduler(trained, model)
    shift = 0 if isinstance(model.schedule, Straight) else 1
    told = {"sample_size": model.codec.shape[1]}
    told |= dict.fromkeys(("in_channels", "out_channels"), model.codec.shape[0])
    index: dict[str, Any] = {"_class_name": "DDPMPipeline"}
    if isinstance(model.network, UNet):
        weights, config = _unet(trained, model.network, model.codec.shape[1:], shift)
        table = model.conditioner.table
        if table is not None:
            weights["class_embedding.weight"] = table.weight
            config["num_class_embeds"] = len(table.weight)
        parts = {"unet": Part("UNet2DModel", weights, config | told)}
    elif isinstance(model.network, DiT):
        weights, config = _dit(trained, model.network, model.conditioner, shift)
        parts = {"transformer": Part("DiTTransformer2DModel", weights, config | told)}
        names = trained.data["label_names"]
        index["id2label"] = {str(i): name for i, name in enumerate(names)}
    else:
        kind = type(model.network).__name__
        raise _unfit(trained, f"its network is a {kind}, not a UNet or a DiT")
    if isinstance(model.codec, Latents):
        pipeline, place = ("LDMPipeline", "vqvae") if "unet" in parts else ("DiTPipeline", "vae")
        index["_class_name"] = pipeline
        parts[place] = _autoencoder(trained, model.codec)
    elif "transformer" in parts:
        raise _unfit(trained, "with a DiT diffusers draws latents, and this one draws pixels")
    elif type(model.codec) is not Pixels:
        raise _unfit(trained, f"it draws {type(model.codec).__name__}, not pixels or latents")
    parts["scheduler"] = scheduler
    _save(out, parts, index)
    return out


def _save(out: Path, parts: Mapping[str, Part], index: Mapping[str, Any]) -> None:
    """Write the folder of a pipeline: a folder for each part, and the index of them."""
    for name, part in parts.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        if part.weights:
            plain = {key: tensor.detach().float().cpu() for key, tensor in part.weights.items()}
            plain = {key: tensor.clone().contiguous() for key, tensor in plain.items()}
            path = folder / "diffusion_pytorch_model.safetensors"
            checkpoint.put(path, plain, {"format": "pt"})
        config = "config" if part.weights else "scheduler_config"
        _write(folder / f"{config}.json", {"_class_name": part.kind, **part.config})
    listed = {name: ["diffusers", part.kind] for name, part in parts.items()}
    _write(out / "model_index.json", {**index, **listed})


def _write(path: Path, told: Mapping[str, Any]) -> None:
    whole = {"_diffusers_version": FORM, **told}
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _scheduler(trained: Trained, model: Diffusion) -> Part:
    """Return the scheduler that steps as the model does; it has no weights."""
    schedule, latents = model.schedule, isinstance(model.codec, Latents)
    target = trained.recipe["model"].get("target", "noise")
    betas = (
        "--set 'model.schedule={type=\"diffusion.schedules.Linear\"}' --set model.target=velocity"
    )
    if isinstance(schedule, Straight):
        if latents:
            raise _unfit(
                trained,
                f"no pipeline of diffusers draws latents along straight paths; train with {betas}",
            )
        if target != "straight":
            raise _unfit(trained, f"along straight paths it predicts the {target}, not straight")
        if model.scale_input:
            raise _unfit(
                trained,
                "no scheduler of diffusers brings the input of straight paths to unit variance; "
                "train with --set model.scale_input=false",
            )
        kind = "FlowMatchEulerDiscreteScheduler"
        return Part(kind, {}, {"num_train_timesteps": STEPS, "shift": 1.0})
    if not isinstance(schedule, Betas):
        raise _unfit(trained, f"its schedule is {type(schedule).__name__}, not one of betas")
    if target not in PREDICTIONS:
        raise _unfit(trained, f"it predicts the {target}, not noise, image or velocity")
    if schedule.steps != STEPS:
        raise _unfit(trained, f"its schedule has {schedule.steps} steps, not {STEPS}")
    told = {
        "num_train_timesteps": STEPS,
        "trained_betas": (-torch.expm1(schedule.log_alpha2.diff())).tolist(),
        "prediction_type": PREDICTIONS[target],
        "timestep_spacing": "trailing",
        "clip_sample": not latents,
    }
    if latents:
        return Part("DDIMScheduler", {}, {**told, "set_alpha_to_one": True})
    return Part("DDPMScheduler", {}, {**told, "variance_type": "fixed_small"})


def _autoencoder(trained: Trained, codec: Latents) -> Part:
    """Return the first stage; what lies around its latents is in convolutions of 1 x 1."""
    stage = codec.stage.module
    if not isinstance(stage, AutoencoderKL) or not (
        isinstance(stage.encoder, StageEncoder) and isinstance(stage.decoder, StageDecoder)
    ):
        raise _unfit(
            trained,
            "the networks of its first stage are no StageEncoder and StageDecoder of "
            "networks.kl_autoencoder, whose layout diffusers' AutoencoderKL has",
        )
    encoder, latent = stage.encoder, codec.shape[0]
    mean = codec.mean.flatten()
    weights = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    weights |= {f"decoder.{key}": tensor for key, tensor in stage.decoder.state_dict().items()}
    weights["quant_conv.weight"] = torch.eye(2 * latent)[:, :, None, None]
    weights["quant_conv.bias"] = torch.cat([-mean, torch.full_like(mean, CALM)])
    weights["post_quant_conv.weight"] = torch.eye(latent)[:, :, None, None]
    weights["post_quant_conv.bias"] = mean
    count = len(encoder.widths)
    config = {
        "in_channels": codec.picture[0],
        "out_channels": codec.picture[0],
        "sample_size": codec.picture[1],
        "latent_channels": latent,
        "block_out_channels": encoder.widths,
        "layers_per_block": encoder.blocks,
        "norm_num_groups": encoder.groups,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "mid_block_add_attention": len(encoder.mid_block.attentions) > 0,
        "scaling_factor": 1 / float(codec.deviation),
        "force_upcast": False,
    }
    return Part("AutoencoderKL", weights, config)


def _dit(
    trained: Trained, network: DiT, labels: Labels, shift: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a DiT's weights under diffusers' names, and the config that says what it is."""
    told, width = trained.recipe["model"]["network"], network.width
    if network.conditioning != "adaln-zero" or network.rotary or told.get("qk_norm"):
        raise _unfit(
            trained, "its DiT is not adaln-zero, has rotary positions or normalises queries"
        )
    if not told.get("inclusive"):
        raise _unfit(
            trained,
            "its DiT is told the time by other frequencies than diffusers'; train with "
            "--set model.network.inclusive=true",
        )
    if network.embedding_dim != width or labels.classes > CLASSES:
        raise _unfit(
            trained,
            f"its embeddings are {network.embedding_dim} wide and its DiT {width}, or its "
            f"{labels.classes} classes are more than {CLASSES}",
        )
    assert network.modulation is not None
    table = torch.zeros(CLASSES + 1, width)
    if labels.table is not None:
        table[: labels.classes], table[CLASSES] = labels.table.weight[:-1], labels.table.weight[-1]
    first = network.time.up.weight
    if shift:
        first = _later(first.double(), TimeEmbedding.FEATURES, network.time.period).float()
    patch, channels = network.patch, network.leave.out_features // network.patch**2
    # A pixel's channels are together there, a channel's pixels here.
    fold = torch.arange(channels * patch**2).view(channels, patch**2).T.flatten()
    weights: dict[str, Tensor] = {}
    for p in ("weight", "bias"):
        made = network.modulation.linear.get_parameter(p).split(width)
        weights[f"pos_embed.proj.{p}"] = network.enter.get_parameter(p)
        weights[f"proj_out_1.{p}"] = torch.cat(made[-2:])
        weights[f"proj_out_2.{p}"] = network.leave.get_parameter(p)[fold]
        for i, block in enumerate(network.blocks):
            at = f"transformer_blocks.{i}"
            shift1, scale1, shift2, scale2, gate1, gate2 = made[6 * i : 6 * i + 6]
            six = [shift1, scale1, gate1, shift2, scale2, gate2]
            weights[f"{at}.norm1.linear.{p}"] = torch.cat(six)
            thirds = block.get_parameter(f"attention.qkv.{p}").chunk(3)
            for letter, third in zip("qkv", thirds, strict=True):
                weights[f"{at}.attn1.to_{letter}.{p}"] = third
            weights[f"{at}.attn1.to_out.0.{p}"] = block.get_parameter(f"attention.out.{p}")
            weights[f"{at}.ff.net.0.proj.{p}"] = block.get_parameter(f"up.{p}")
            weights[f"{at}.ff.net.2.{p}"] = block.get_parameter(f"down.{p}")
            embedder = f"{at}.norm1.emb.timestep_embedder"
            up = first if p == "weight" else network.time.up.bias
            weights[f"{embedder}.linear_1.{p}"] = up
            weights[f"{embedder}.linear_2.{p}"] = network.time.down.get_parameter(p)
            weights[f"{at}.norm1.emb.class_embedder.embedding_table.weight"] = table
    enter = weights["pos_embed.proj.weight"]
    weights["pos_embed.proj.weight"] = enter.view(width, -1, patch, patch)
    config = {
        "num_attention_heads": network.heads,
        "attention_head_dim": width // network.heads,
        "num_layers": len(network.blocks),
        "patch_size": patch,
        "num_embeds_ada_norm": CLASSES,
        "norm_eps": 1e-6,
    }
    return weights, config


def _unfit(trained: Trained, why: str) -> UserError:
    return UserError(
        f"{trained.name} cannot be exported to diffusers: {why}; what can is told in docs/stable.md"
    )


def _unet(
    trained: Trained, network: UNet, sides: Sequence[int], shift: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a U-Net's weights under diffusers' names, and the config that says what it is."""
    told = trained.recipe["model"]["network"]
    height, width = sides
    if height % network.multiple or width % network.multiple:
        raise _unfit(trained, f"diffusers cannot halve {height}x{width} as often as it does")
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
    if shift:
        later = _later(first.double(), network.channels)
        weights["time_embedding.linear_1.weight"] = later.float()
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


def _later(weight: Tensor, dim: int, period: float = 10_000.0) -> Tensor:
    """Return W' with W' features(k) = W features(k + 1), for the features of `sinusoidal`."""
    half = dim // 2
    turn = torch.exp(-math.log(period) * torch.arange(half, dtype=torch.float64) / half)
    turn = turn.to(weight.device)
    cos, sin = weight[:, :half], weight[:, half:]
    # cos(a + f) = cos a cos f - sin a sin f,  sin(a + f) = cos a sin f + sin a cos f
    return torch.cat(
        [cos * turn.cos() + sin * turn.sin(), sin * turn.cos() - cos * turn.sin()], dim=1
    )
