"""Every packaged recipe, made small enough to train in a test."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
from PIL import Image

from trilemma import recipe

SIZE = 16

# What makes a class small, by its path in a recipe. A new network adds its line here.
SMALL: dict[str, dict] = {
    "networks.dcgan.Generator": {"channels": 4},
    "networks.dcgan.Critic": {"channels": 4},
    "networks.modulated.Generator": {"channels": 4},
    "networks.resnet_generator.Generator": {"channels": 4, "blocks": 1},
    "networks.patchgan.Critic": {"channels": 4},
    "networks.coupling.Glow": {"steps": 2, "channels": 8},
    "networks.coupling.RealNVP": {"couplings": 2, "channels": 8, "blocks": 1},
    "networks.residual.Critic": {"channels": 4},
    "networks.progan.Generator": {"channels": 4},
    "networks.progan.Critic": {"channels": 4},
    "models.progan.ProGAN": {"stage_images": 8, "fade_images": 32},  # steps 2 to 5 are a fade
    "networks.srresnet.Generator": {"width": 8, "blocks": 1},
    "networks.srresnet.Critic": {"width": 4},
    "models.srgan.SRGAN": {"content": "pixels"},  # VGG is a file of its own
    "networks.convnet.Encoder": {"channels": 4},
    "networks.convnet.Decoder": {"channels": 4},
    "networks.convnet.GridEncoder": {"channels": 8, "blocks": 1},
    "networks.convnet.GridDecoder": {"channels": 8, "blocks": 1},
    "models.first_stage.AutoencoderKL": {"start": 0, "weights": "none"},  # critic from the start
    "models.first_stage.VQGAN": {"start": 0, "weights": "none"},
    "networks.quick_unet.QuickUNet": {"channels": [16, 24], "blocks": [1, 1]},
    "networks.quick_unet.QuickClassifier": {"channels": [16, 24], "blocks": [1, 1]},
    "networks.pixelcnn.PixelCNN": {"channels": 8, "dilations": [1, 2]},
    "networks.transformer.CausalTransformer": {"width": 16, "layers": 2, "heads": 2},
    "networks.dit.DiT": {"width": 16, "depth": 2, "heads": 2},
    "networks.mamba.Mamba": {"width": 16, "depth": 2, "state": 4, "head_dim": 8},
    "networks.vit.VisionTransformer": {"width": 16, "depth": 2, "heads": 2},
    "networks.prior.Prior": {"words": [8, 16], "width": 16, "layers": 1, "heads": 2},
    "networks.text.TextTransformer": {
        "width": 16,
        "depth": 2,
        "heads": 2,
        "embedding": 4,
        "context": 8,
    },
    "networks.unet.UNet": {
        "channels": 32,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention": [8],
        "dropout": 0.0,
    },
}

# The images seen at moments of training between which each parameter has its turn; else [0].
MOMENTS: dict[str, list[int]] = {
    "progan": [0, 24, 64],  # 4 pixels, the fade from 4 to 8, the fade from 8 to 16
}


def overrides(name: str) -> list[str]:
    """Return the `--set` changes that shrink a packaged recipe."""
    train = ["train.batch=8", "train.grids=0", "train.compile=off"]
    return [*_changes("model", recipe.load(name)["model"]), *train]


def _changes(path, spec):
    for key, value in spec.items():
        if isinstance(value, dict):
            yield from _changes(f"{path}.{key}", value)
    for key, value in SMALL.get(spec.get("type", ""), {}).items():
        yield f"{path}.{key}={value}"


def translates(name: str) -> bool:
    """Whether a packaged recipe needs pictures of two domains."""
    return recipe.load(name).get("data", {}).get("pair") == "unpaired"


def enlarges(name: str) -> bool:
    """Whether a packaged recipe enlarges pictures."""
    return recipe.load(name).get("data", {}).get("pair") == "shrunk"


def restores(name: str) -> bool:
    """Whether a packaged recipe is a first stage, which draws nothing by itself."""
    return recipe.load(name)["model"]["type"].startswith("models.first_stage.")


def repairs(name: str) -> bool:
    """Whether a packaged recipe draws what given pictures lack."""
    return recipe.load(name).get("data", {}).get("pair") == "damaged"


def classifies(name: str) -> bool:
    """Whether a packaged recipe tells classes, and draws nothing."""
    return recipe.load(name)["model"]["type"] == "models.classifier.Classifier"


def matches(name: str) -> bool:
    """Whether a packaged recipe tells which pictures and words go together, and draws nothing."""
    return recipe.load(name)["model"]["type"] == "models.clip.CLIP"


def embeds(name: str) -> bool:
    """Whether a packaged recipe draws embeddings of pictures, and no pictures."""
    return recipe.load(name)["model"]["type"].endswith("Prior")


def reads_words(name: str) -> bool:
    """Whether a packaged recipe needs pictures with captions."""
    return "captions" in recipe.load(name)["about"]["needs"]


def captioned(folder: Path) -> Path:
    """Write the pictures of `pictures`, a caption beside each."""
    for i, path in enumerate(sorted(pictures(folder).rglob("*.png"))):
        path.with_suffix(".txt").write_text(f"{path.parent.name} number {i}")
    return folder


def domains(folder: Path) -> Path:
    """Write trainA and trainB, of 12 and 10 pictures: bright shapes on dark, dark on bright."""
    pictures(folder / "trainA", 12, 1)
    pictures(folder / "trainB", 10, 1)
    for path in (folder / "trainB").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    return folder


def pictures(folder: Path, count: int = 20, classes: int = 3) -> Path:
    """Write class folders of small colour pictures: a bright shape on a dark ground."""
    draw = np.random.default_rng(0)
    for i in range(count):
        image = np.full((SIZE, SIZE, 3), 40, np.uint8)
        x, y = draw.integers(0, SIZE // 2, 2)
        image[y : y + SIZE // 2, x : x + SIZE // 2, i % classes] = draw.integers(128, 256)
        path = folder / f"class{i % classes}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def free_port() -> int:
    """Return a port of this machine at which nobody listens."""
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]
