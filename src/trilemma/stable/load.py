"""Opening a checkpoint: a diffusers folder or a single safetensors file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trilemma import checkpoint, device, recipe
from trilemma.errors import UserError
from trilemma.networks.kl_autoencoder import KLAutoencoder
from trilemma.networks.spatial_unet import SpatialUNet
from trilemma.networks.tiny_autoencoder import TinyAutoencoder
from trilemma.stable import (
    configs,
    files,
    keys,
    load_rectified,
    loading,
    lora,
    packing,
    rectified_lora,
    text,
)
from trilemma.stable.pipeline import Autoencoder, StableDiffusion
from trilemma.stable.rectified import Rectified
from trilemma.stable.schedule import Spacing, from_config

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
SUPPORTED = (
    "a diffusers folder or a single safetensors file of Stable Diffusion 1, 2, XL or 3, or FLUX.1"
)
SCALED: dict[str, Any] = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
SCALED |= {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "set_alpha_to_one": False}
"""What single files, which say nothing of it, were trained with."""


def recognises(path: Path) -> bool:
    """Say whether a path is a checkpoint from elsewhere, and no run: to be opened here.

    A pickle is one too, so that it is refused with the reason.
    """
    if path.is_dir():
        return (path / "model_index.json").is_file()
    if not path.is_file():
        return False
    if path.suffix in checkpoint.PICKLES:
        return True
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "trilemma" not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True


def load(
    path: str | Path,
    device_name: str | None = None,
    *,
    loras: Sequence[str] = (),
    precision: str = "auto",
    prediction: str | None = None,
    parts: str | Path | None = None,
    learns: bool = False,
) -> StableDiffusion | Rectified:
    """Open a checkpoint.

    Args:
        path: the folder, or the file.
        device_name: `cpu`, `cuda`, `mps`; None picks the fastest there is.
        loras: FILE or FILE:WEIGHT each.
        precision: auto, bf16 or fp32: `device.dtype`.
        prediction: what a single file's network predicts, where it is not what is usual:
            epsilon or v_prediction.
        parts: a diffusers folder, for what a single file of Stable Diffusion 3 or FLUX.1 lacks.
        learns: the network is to be changed, so its weights stay as they are (`packing`).

    Raises:
        UserError: what is there cannot be used; named precisely.
    """
    path = Path(path)
    where = device.pick(device_name)
    kind = device.dtype(precision, where)
    device.prepare(torch.nn.Identity(), where, kind)  # the process's own settings
    if prediction not in (None, "epsilon", "v_prediction"):
        raise UserError(f"prediction is '{prediction}'; expected epsilon or v_prediction")
    if not path.exists():
        raise UserError(f"{path} does not exist; expected {SUPPORTED}")
    inside = path / "model.safetensors" if path.is_dir() else path
    if inside.suffix == ".safetensors" and inside.is_file() and not recognises(path):
        raise UserError(
            f"{path} is no checkpoint from elsewhere; expected {SUPPORTED}; to fine-tune a run, "
            f"trilemma train RECIPE --init {path}"
        )
    packs = not learns and packing.pays(where, kind)
    try:
        rectified = _rectified(path, parts, where, kind)
        plain = rectified is None and parts is None
        opened = (_folder if path.is_dir() else _file)(path, where, kind) if plain else None
    except torch.OutOfMemoryError:
        raise
    except recipe.WRONG as error:  # what configs and shapes say
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} says of its networks what none known can be ({what}): it is damaged, or of "
            f"an architecture that is not known; expected {SUPPORTED}"
        ) from error
    if rectified is not None:
        for each in loras:
            rectified_lora.add(rectified, each)
        if packs:
            packing.pack(rectified.network)
        return rectified
    if opened is None:
        raise UserError(f"{path} is whole; only Stable Diffusion 3 and FLUX.1 take parts")
    if prediction is not None:
        opened = replace(opened, spacing=replace(opened.spacing, prediction=prediction))
    for each in loras:
        lora.add(opened, each)
    if packs:
        packing.pack(opened.unet)
    return opened


def _rectified(
    path: Path, parts: str | Path | None, where: torch.device, kind: torch.dtype
) -> Rectified | None:
    """Open Stable Diffusion 3 or FLUX.1; None if the checkpoint is of neither."""
    if path.is_dir():
        if load_rectified.kind_of_folder(path) is None:
            return None
        return load_rectified.folder(path, where, kind)
    tensors, _ = files.read(path)
    if load_rectified.kind_of_file(tensors) is None:
        return None
    return load_rectified.file(path, tensors, None if parts is None else Path(parts), where, kind)


def _folder(path: Path, where: torch.device, kind: torch.dtype) -> StableDiffusion:
    index = files.read_json(path / "model_index.json")
    named = index.get("_class_name")
    if named not in PIPELINES:
        raise UserError(f"{path} is of a {named}, which is not known; expected {SUPPORTED}")
    large = named.startswith("StableDiffusionXL")
    towers = []
    for i in ("", "_2"):
        folder = path / f"text_encoder{i}"
        if not folder.is_dir():
            continue
        words = path / f"tokenizer{i}"
        tokenizer = text.tokenizer(words)
        config = files.read_json(folder / "config.json")
        tensors = files.weights(folder, ("model", "diffusion_pytorch_model"))
        towers.append(
            text.Tower(tokenizer, text.encoder(config, tensors, str(folder), where, kind))
        )
    if not towers:
        raise UserError(f"{path} has no text_encoder folder: it is not complete; fetch it again")
    reader = text.Reader(towers, inner=large)
    told = configs.unet(files.read_json(path / "unet" / "config.json"), str(path / "unet"))
    told = configs.split_added(told, reader.vector_dim)
    network = unet(told, files.weights(path / "unet"), str(path / "unet"), where, kind)
    coder = _coder(path / "vae", where, kind)
    scheduler = path / "scheduler" / "scheduler_config.json"
    spacing = from_config(files.read_json(scheduler), str(scheduler))
    side = files.read_json(path / "unet" / "config.json").get("sample_size") or 64
    side = side if isinstance(side, int) else side[0]
    zeros = large and bool(index.get("force_zeros_for_empty_prompt", True))
    return _joined(network, coder, reader, spacing, side * coder.factor, zeros, kind, where)


def unet(
    told: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    name: str,
    where: torch.device,
    kind: torch.dtype,
) -> SpatialUNet:
    """Return a U-Net with its weights: of float32, views on a CPU.

    Convolutions laid out anew would be a few percent faster, and take longer than reading the file.

    Args:
        told: arguments of `SpatialUNet`.
        tensors: views of a file.
        name: is told in errors.
        where: the device.
        kind: number format of matrix products.
    """
    with torch.device("meta"):
        network = SpatialUNet(**told)
    views = where.type == "cpu" and kind == torch.float32
    return loading.fill(network, tensors, name, where, kind, views)


def _joined(
    network: SpatialUNet,
    coder: Autoencoder,
    reader: text.Reader,
    spacing: Spacing,
    size: int,
    zeros: bool,
    kind: torch.dtype,
    where: torch.device,
) -> StableDiffusion:
    latent = coder.latent
    if network.out_channels != latent or network.in_channels not in (latent, 2 * latent + 1):
        raise UserError(
            f"the U-Net maps {network.in_channels} channels to {network.out_channels} and latents "
            f"have {latent}; expected {latent} or {2 * latent + 1} to {latent}"
        )
    return StableDiffusion(network, coder, reader, spacing, size, zeros, kind, where)


def _coder(folder: Path, where: torch.device, kind: torch.dtype) -> Autoencoder:
    config = files.read_json(folder / "config.json")
    tensors = files.weights(folder)
    if config.get("_class_name") == "AutoencoderTiny":
        with torch.device("meta"):
            small = TinyAutoencoder(**configs.tiny(config, str(folder)))
        return loading.fill(small, tensors, str(folder), where, kind)
    with torch.device("meta"):
        coder = KLAutoencoder(**configs.autoencoder(config, str(folder)))
    return loading.fill(coder, keys.autoencoder(tensors), str(folder), where, kind)


def tiny(path: str | Path, like: StableDiffusion | Rectified) -> TinyAutoencoder:
    """Open a tiny autoencoder for previews of a checkpoint's latents.

    Args:
        path: a folder of diffusers, or the decoder's own file (taesd_decoder.safetensors).
        like: the checkpoint.

    Raises:
        UserError: there is none, or it is of other latents.
    """
    path = Path(path)
    if path.is_dir():
        coder = _coder(path, like.where, like.kind)
        if not isinstance(coder, TinyAutoencoder):
            raise UserError(
                f"{path} is no tiny autoencoder; expected a folder of an AutoencoderTiny"
            )
    else:
        tensors = keys.tiny_part(files.read(path)[0])
        if "layers.0.weight" not in tensors or "layers.3.conv.0.weight" not in tensors:
            raise UserError(f"{path} is no decoder of a tiny autoencoder, such as TAESD's")
        width, latent = tensors["layers.0.weight"].shape[:2]
        with torch.device("meta"):
            coder = TinyAutoencoder(width, latent=latent)
        loading.fill(coder.decoder, tensors, str(path), like.where, like.kind)
    if coder.latent != like.autoencoder.latent:
        raise UserError(
            f"{path} decodes latents of {coder.latent} channels, and the checkpoint's have "
            f"{like.autoencoder.latent}"
        )
    return coder


def _file(path: Path, where: torch.device, kind: torch.dtype) -> StableDiffusion:
    tensors, facts = files.read(path)
    unet_tensors = keys.strip(tensors, keys.UNET)
    coder_tensors = keys.strip(tensors, keys.AUTOENCODER)
    if not unet_tensors or not coder_tensors:
        raise UserError(
            f"{path} holds no {'autoencoder' if unet_tensors else 'U-Net'} of Stable Diffusion "
            f"(no name begins with {keys.AUTOENCODER if unet_tensors else keys.UNET}); expected "
            f"{SUPPORTED}"
        )
    try:
        ours, coder_ours = keys.unet(unet_tensors), keys.autoencoder(coder_tensors)
        told = configs.unet_of(ours)
        reader, version = _reader(path, tensors, where, kind)
        scale = 0.13025 if version == "XL" else 0.18215
        coder_told = configs.autoencoder_of(coder_ours, scale)
    except KeyError as error:
        raise UserError(
            f"{path} holds no {error}: it is not complete, or of an architecture that is not "
            f"known; expected {SUPPORTED}"
        ) from error
    told = configs.split_added(told, reader.vector_dim)
    network = unet(told, ours, f"{path} ({keys.UNET}*)", where, kind)
    with torch.device("meta"):
        coder = KLAutoencoder(**coder_told)
    loading.fill(coder, coder_ours, f"{path} ({keys.AUTOENCODER}*)", where, kind)
    prediction = _prediction(version, tensors, facts)
    size = {"XL": 1024, "2": 768 if prediction == "v_prediction" else 512}.get(version, 512)
    scheduler: dict[str, Any] = {**SCALED, "prediction_type": prediction}
    if version == "XL":
        scheduler |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
        scheduler |= {"rescale_betas_zero_snr": "ztsnr" in tensors}
    spacing = from_config(scheduler, str(path))
    return _joined(network, coder, reader, spacing, size, version == "XL", kind, where)


def _reader(
    path: Path, tensors: Mapping[str, Tensor], where: torch.device, kind: torch.dtype
) -> tuple[text.Reader, str]:
    """Return the text towers of a single file, and the version: 1, 2 or XL."""

    def tower(prefix: str, opened: bool, pad: str, drop: bool = False) -> text.Tower:
        part = keys.strip(tensors, prefix)
        part = keys.open_clip(part) if opened else part
        if drop:  # version 2 was trained on the states before the last layer
            part.pop("text_projection.weight", None)
            last = max(int(n.split(".")[3]) for n in part if n.startswith("text_model.encoder."))
            part = {n: t for n, t in part.items() if f".layers.{last}." not in n}
        config = configs.clip_of(part, "gelu" if opened else "quick_gelu")
        projected = "text_projection.weight" in part
        told = f"{path} ({prefix}*)"
        network = text.encoder(config, part, told, where, kind, projected)
        return text.Tower(text.own_tokenizer(pad), network)

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    end = "<|endoftext|>"
    if has(keys.XL_SECOND):
        towers = [tower(keys.XL_FIRST, False, end), tower(keys.XL_SECOND, True, "!")]
        return text.Reader(towers, inner=True), "XL"
    if has(keys.REFINER):
        return text.Reader([tower(keys.REFINER, True, "!")], inner=True), "XL"
    if has(keys.TEXT1):
        return text.Reader([tower(keys.TEXT1, False, end)], inner=False), "1"
    if has(keys.TEXT2):
        return text.Reader([tower(keys.TEXT2, True, "!", drop=True)], inner=False), "2"
    raise UserError(f"{path} holds no text encoder; expected one beside the U-Net, in {SUPPORTED}")


def _prediction(version: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """Return what a single file's network predicts.

    The file says so in its metadata, or by an empty tensor `v_pred`; else version 2 predicts the
    velocity, as its models of 768 pixels do, and the others the noise.
    """
    said = facts.get("modelspec.prediction_type") or facts.get("modelspec.predict_key") or ""
    if said:
        return "v_prediction" if said.startswith("v") else "epsilon"
    if "v_pred" in tensors:
        return "v_prediction"
    return "v_prediction" if version == "2" else "epsilon"
