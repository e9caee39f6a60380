"""Opening a checkpoint of Stable Diffusion 3 or FLUX.1: a diffusers folder or a single file.

Single files often hold the transformer alone, and never T5's tokenizer. What a file lacks is taken
from `parts`, a diffusers folder of the same model, of which the `transformer` is not read:

    | part        | SD3's folder                     | FLUX's folder   | in a file          |
    |-------------|----------------------------------|-----------------|--------------------|
    | transformer | transformer                      | transformer     | TRANSFORMER        |
    | autoencoder | vae                              | vae             | AUTOENCODERS       |
    | CLIP        | text_encoder, text_encoder_2     | text_encoder    | CLIP_L, CLIP_G     |
    | T5          | text_encoder_3, tokenizer_3      | text_encoder_2, | T5, without its    |
    |             |                                  | tokenizer_2     | tokenizer          |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilemma.errors import UserError
from trilemma.networks.flux import Flux
from trilemma.networks.kl_autoencoder import KLAutoencoder
from trilemma.networks.mmdit import MMDiT
from trilemma.stable import configs, files, flow, flux, keys, loading, sd3, t5, text
from trilemma.stable.places import Place, check, find
from trilemma.stable.rectified import Flux1, Rectified, StableDiffusion3
from trilemma.stable.t5 import Encoder

PIPELINES = {
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusion3Img2ImgPipeline": "sd3",
    "StableDiffusion3InpaintPipeline": "sd3",
    "FluxPipeline": "flux",
    "FluxImg2ImgPipeline": "flux",
    "FluxInpaintPipeline": "flux",
}
TRANSFORMER = "model.diffusion_model."
AUTOENCODERS = ("first_stage_model.", "vae.")
CLIP_L, CLIP_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."
T5 = "text_encoders.t5xxl.transformer."
SCALES = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}
"""Scale and shift of the latents, which single files do not say."""
T5_FOLDERS = {"sd3": "_3", "flux": "_2"}
SIZE = 1024  # of pictures, where nothing says another

Kind = tuple[torch.device, torch.dtype]
"""Where to run, and the number format of matrix products."""


def kind_of_folder(path: Path) -> str | None:
    """Return "sd3" or "flux" if a diffusers folder is of either."""
    named = files.read_json(path / "model_index.json").get("_class_name")
    return PIPELINES.get(str(named))


def kind_of_file(names: Iterable[str]) -> str | None:
    """Return "sd3" or "flux" if the tensors of a single file are of either."""
    for kind, block in (("sd3", "joint_blocks.0."), ("flux", "double_blocks.0.")):
        if any(name.removeprefix(TRANSFORMER).startswith(block) for name in names):
            return kind
    return None


def folder(path: Path, where: torch.device, kind: torch.dtype) -> Rectified:
    """Open a diffusers folder.

    Raises:
        UserError: what is there cannot be used; named precisely.
    """
    model, at = kind_of_folder(path), (where, kind)
    at_network = path / "transformer"
    config = files.read_json(at_network / "config.json")
    tensors = files.weights(at_network)
    try:
        told = (sd3 if model == "sd3" else flux).from_config(
            config, str(at_network / "config.json")
        )
    except KeyError as error:
        raise UserError(f"{at_network / 'config.json'} lacks {error}; fetch it again") from error
    rules = sd3.diffusers_rules(told) if model == "sd3" else flux.diffusers_rules()
    network = _network(told, rules, "", tensors, str(at_network), at)
    scheduler = path / "scheduler" / "scheduler_config.json"
    shift = flow.from_config(files.read_json(scheduler), str(scheduler))
    coder = _coder(path, at)
    size = told["size"] * coder.factor if model == "sd3" else SIZE
    t5_there = (path / f"text_encoder{T5_FOLDERS[str(model)]}").is_dir()
    words = _t5(path, T5_FOLDERS[str(model)], at) if t5_there or model == "flux" else None
    clips = [_clip(path, i, at) for i in (("", "_2") if model == "sd3" else ("",))]
    return _joined(network, coder, shift, clips, words, size, kind)


def file(
    path: Path,
    tensors: Mapping[str, Tensor],
    parts: Path | None,
    where: torch.device,
    kind: torch.dtype,
) -> Rectified:
    """Open a single file.

    Args:
        path: of the file, for errors.
        tensors: of it.
        parts: a diffusers folder of the same model, for what the file lacks.
        where: the device to run on.
        kind: number format of matrix products.

    Raises:
        UserError: what is there cannot be used, or is nowhere; named precisely.
    """
    model, at = kind_of_file(tensors), (where, kind)
    prefix = TRANSFORMER if any(name.startswith(TRANSFORMER) for name in tensors) else ""
    others = (*AUTOENCODERS, "text_encoders.")
    own = {name: t for name, t in tensors.items() if not name.startswith(others)}
    shapes = {name.removeprefix(prefix): tuple(t.shape) for name, t in own.items()}
    try:
        told = sd3.from_shapes(shapes) if model == "sd3" else flux.from_shapes(shapes)
    except KeyError as error:
        raise UserError(f"{path} holds no {prefix}{error.args[0]}: it is not complete") from error
    rules = sd3.original_rules() if model == "sd3" else flux.original_rules()
    network = _network(told, rules, prefix, own, str(path), at)

    def other(prefix: str, make: Callable[[dict[str, Tensor]], Any], name: str) -> Any:
        """Return a part from the file, else from `parts` by a folder's name."""
        if found := keys.strip(tensors, prefix):
            return make(found)
        if parts is None:
            raise UserError(
                f"{path} holds no {name} (no name begins with {prefix}); give a diffusers folder "
                "of this model, from which to take it, as --option parts=FOLDER"
            )
        return None

    coder_prefix = next((p for p in AUTOENCODERS if keys.strip(tensors, p)), AUTOENCODERS[0])
    coder = other(
        coder_prefix,
        lambda own: _own_coder(own, str(model), f"{path} ({coder_prefix}*)", at),
        "autoencoder",
    )
    coder = coder or _coder(_given(parts), at)
    clips = []
    for i, (place, act, pad) in enumerate(
        ((CLIP_L, "quick_gelu", "<|endoftext|>"), (CLIP_G, "gelu", "!"))[
            : 2 if model == "sd3" else 1
        ]
    ):
        own_clip = _own_clip(str(path), place, act, pad, at, projected=model == "sd3")
        clip = other(place, own_clip, "CLIP text encoder")
        clips.append(clip or _clip(_given(parts), "_2" if i else "", at))
    words = _file_t5(path, tensors, str(model), parts, at)
    static = model == "sd3" or not told["guided"]
    shift = flow.Shift(3.0 if model == "sd3" else 1.0, dynamic=not static)
    return _joined(network, coder, shift, clips, words, SIZE, kind)


def _given(parts: Path | None) -> Path:
    assert parts is not None
    return parts


def _joined(
    network: MMDiT | Flux,
    coder: KLAutoencoder,
    shift: flow.Shift,
    clips: Sequence[Encoder],
    words: Encoder | None,
    size: int,
    kind: torch.dtype,
) -> Rectified:
    """Put the parts together; raises UserError when they do not belong to each other."""
    config: Any = None if words is None else words.network.config
    for what, seen, expected in (
        ("latents of the autoencoder", coder.latent, network.channels),
        ("T5's states", config and config.d_model, config and network.text_dim),
    ):
        if seen != expected:
            raise UserError(
                f"{what} have {seen} channels and the transformer reads {expected}: the parts "
                "do not belong together"
            )
    if isinstance(network, MMDiT):
        first, second = clips
        return StableDiffusion3(network, coder, shift, (first, second), words, size=size, kind=kind)
    assert words is not None
    return Flux1(network, coder, shift, clips[0], words, size=size, kind=kind)


def _network(
    told: Mapping[str, Any],
    rules: Sequence[tuple[str, Place]],
    prefix: str,
    tensors: Mapping[str, Tensor],
    where: str,
    at: Kind,
) -> Any:
    """Return the transformer with its weights; every tensor given must be one of its."""
    with torch.device("meta"):
        network = MMDiT(**told) if "table" in told else Flux(**told)
    places = find(network.state_dict(), rules, prefix)
    check(places.values(), tensors, where)
    own = {name: place.take(tensors[place.name]) for name, place in places.items()}
    return loading.fill(network, own, where, *at)


def _coder(path: Path, at: Kind) -> KLAutoencoder:
    """Return the autoencoder of a diffusers folder."""
    place = path / "vae"
    with torch.device("meta"):
        told = configs.autoencoder(files.read_json(place / "config.json"), str(place))
        network = KLAutoencoder(**told)
    return loading.fill(network, keys.autoencoder(files.weights(place)), str(place), *at)


def _own_coder(tensors: Mapping[str, Tensor], model: str, where: str, at: Kind) -> KLAutoencoder:
    """Return the autoencoder of a single file."""
    ours, (scale, shift) = keys.autoencoder(tensors), SCALES[model]
    with torch.device("meta"):
        network = KLAutoencoder(**configs.autoencoder_of(ours, scale) | {"shift": shift})
    return loading.fill(network, ours, where, *at)


def _clip(path: Path, i: str, at: Kind) -> Encoder:
    """Return a CLIP tower of a diffusers folder."""
    place = path / f"text_encoder{i}"
    tokenizer = text.tokenizer(path / f"tokenizer{i}")
    config, tensors = files.read_json(place / "config.json"), files.weights(place, ("model",))
    return Encoder(tokenizer, text.encoder(config, tensors, str(place), *at))


def _own_clip(
    path: str, prefix: str, act: str, pad: str, at: Kind, projected: bool
) -> Callable[[dict[str, Tensor]], Encoder]:
    """Return what makes a CLIP tower of its tensors in a single file.

    Files without a projection have one that changes nothing; FLUX reads no projected vector.
    """

    def make(tensors: dict[str, Tensor]) -> Encoder:
        made = {
            name: t for name, t in tensors.items() if projected or name != "text_projection.weight"
        }
        if projected and "text_projection.weight" not in made:
            width = made["text_model.final_layer_norm.weight"].shape[0]
            made["text_projection.weight"] = torch.eye(width)
        config = configs.clip_of(made, act)
        network = text.encoder(config, made, f"{path} ({prefix}*)", *at, projected)
        return Encoder(text.own_tokenizer(pad), network)

    return make


def _file_t5(
    path: Path, tensors: Mapping[str, Tensor], model: str, parts: Path | None, at: Kind
) -> Encoder | None:
    """Return T5 of a single file with the tokenizer of `parts`, or that of `parts`.

    None for Stable Diffusion 3 where there is none in either.
    """
    own, i = keys.strip(tensors, T5), T5_FOLDERS[model]
    if own:
        if parts is None:
            raise UserError(
                f"{path} holds T5 without its tokenizer; give a diffusers folder of this model "
                f"with tokenizer{i} in it, as --option parts=FOLDER"
            )
        return _t5_of(t5.tokenizer(parts / f"tokenizer{i}"), None, own, f"{path} ({T5}*)", at)
    if parts is not None and (model == "flux" or (parts / f"text_encoder{i}").is_dir()):
        return _t5(parts, i, at)
    if model == "flux":
        raise UserError(
            f"{path} holds no T5 (no name begins with {T5}); give a diffusers folder of this "
            "model, from which to take it, as --option parts=FOLDER"
        )
    return None


def _t5(path: Path, i: str, at: Kind) -> Encoder:
    """Return T5 of a diffusers folder."""
    place = path / f"text_encoder{i}"
    config, tensors = files.read_json(place / "config.json"), files.weights(place, ("model",))
    return _t5_of(t5.tokenizer(path / f"tokenizer{i}"), config, tensors, str(place), at)


def _t5_of(
    tokenizer: Any,
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    where: str,
    at: Kind,
) -> Encoder:
    """Return T5 with its weights, by its configuration or, if None, by their shapes."""
    library = text.transformers(where)
    try:
        told = config or t5.config_of({name: tuple(v.shape) for name, v in tensors.items()})
    except KeyError as error:
        raise UserError(f"{where} holds no {error.args[0]}: it is not complete") from error
    network: Any = text.empty(library.T5EncoderModel, library.T5Config, told, where)
    table = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    tables = {} if table is None else {"shared.weight": table, "encoder.embed_tokens.weight": table}
    loading.fill(network, {**tensors, **tables}, where, *at)
    network.encoder.embed_tokens = network.shared  # one table, once in memory
    return Encoder(tokenizer, network)
