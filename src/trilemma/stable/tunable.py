"""A checkpoint as fine-tuning meets it, and what is asked of it once.

Each picture's latents (mean and deviation, so that training draws anew each time) and each
different caption's embedding are computed before training and kept in files beside the result, of
which training reads the rows of a batch. The text encoders and the autoencoder are then no longer
needed.

Losses are those of training: of the noise or velocity, at times drawn evenly, for Stable Diffusion
1, 2 and XL; of noise - x_0 for Stable Diffusion 3 and FLUX.1 (`rectified`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trilemma import device
from trilemma.batch import Rng, to_float
from trilemma.data.dataset import Dataset
from trilemma.errors import UserError
from trilemma.networks.layers import Embedded
from trilemma.stable.pipeline import StableDiffusion
from trilemma.stable.places import Place
from trilemma.stable.rectified import moments

log = logging.getLogger(__name__)


class Tunable(Protocol):
    """A checkpoint that can be fine-tuned.

    Attributes:
        lora_prefix: what diffusers puts before the names of the network's layers.
    """

    lora_prefix: str

    @property
    def network(self) -> nn.Module:
        """Return what learns; its `recompute` says that it keeps no activations."""
        ...

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation (B, C, h, w) of the latents of images in [-1, 1]."""
        ...

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return texts as the network reads them."""
        ...

    def loss(self, x0: Tensor, text: Embedded, rng: Rng) -> Tensor:
        """Return the loss (B,) of latents x0 (B, C, h, w), noise and times drawn from `rng`."""
        ...

    def diffusers_places(self) -> Mapping[str, Place]:
        """Return where each weight of the network stands in diffusers' layout."""
        ...


class TunableUNet:
    """Stable Diffusion 1, 2 or XL, to be fine-tuned.

    Captions are read up to the length of CLIP, without the further pieces of longer ones, so that
    all are of one length.

    Args:
        stable: the checkpoint.

    Raises:
        UserError: its U-Net paints into pictures.
    """

    lora_prefix = "unet"

    def __init__(self, stable: StableDiffusion) -> None:
        if stable.paints:
            raise UserError("a checkpoint that paints into pictures cannot be fine-tuned here")
        self.stable, self.network = stable, stable.unet

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation (B, C, h, w) of the latents of images in [-1, 1]."""
        return moments(self.stable.autoencoder, images)

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return texts as the U-Net reads them."""
        read, length = self.stable.reader(texts), self.stable.reader.towers[0].length
        assert read.tokens is not None
        if read.tokens.shape[1] > length:
            log.warning("captions of more than %d tokens are cut", length - 2)
        return Embedded(vector=read.vector, tokens=read.tokens[:, :length])

    def loss(self, x0: Tensor, text: Embedded, rng: Rng) -> Tensor:
        """Return the mean square (B,) of what the U-Net predicts less what it should.

        Args:
            x0: latents (B, C, h, w).
            text: B texts.
            rng: of noise and times.
        """
        spacing, factor = self.stable.spacing, self.stable.autoencoder.factor
        time = (rng.integers(spacing.steps, 1)[:, 0].double() + 1) / spacing.steps
        noise = rng.normal(*x0.shape[1:])
        alpha, sigma = (v.float()[:, None, None, None] for v in spacing.schedule(time))
        size = (x0.shape[2] * factor, x0.shape[3] * factor)
        numbers = self.stable._numbers(size, len(x0), guided=False)
        said = self.network(alpha * x0 + sigma * noise, time, text, numbers)
        sought = {
            "epsilon": noise,
            "sample": x0,
            "v_prediction": alpha * noise - sigma * x0,
        }[spacing.prediction]
        return (said.float() - sought).square().flatten(1).mean(1)

    def diffusers_places(self) -> dict[str, Place]:
        """Return where each weight of the U-Net stands in diffusers' layout: under its name."""
        return {name: Place(name) for name in self.network.state_dict()}


class Cache:
    """Latents and embedded captions of a data set, in files that are mapped into memory.

    Args:
        folder: of the files; what is there of the same pictures and captions is not made again.
        model: makes them.
        data: pictures with captions; of several sizes, one set for each.
        kind: number format of matrix products.
        name: of the checkpoint: what another one made is not used.

    Raises:
        UserError: the pictures have no captions.
    """

    def __init__(
        self,
        folder: Path,
        model: Tunable,
        data: Dataset | Sequence[Dataset],
        kind: torch.dtype = torch.float32,
        name: str = "",
    ) -> None:
        sets = [data] if isinstance(data, Dataset) else data
        self.texts = [each.text or [""] * len(each) for each in sets]
        captions = sorted({"", *(text for texts in self.texts for text in texts)})
        if captions == [""]:
            raise UserError(
                f"{sets[0].name} has no captions; put NAME.txt beside each picture, or a "
                "metadata.csv with the columns file_name and text"
            )
        self.rows = {caption: row for row, caption in enumerate(captions)}
        self.folder = folder / "cache"
        pictures = [each.fingerprint for each in sets]
        told = {"pictures": pictures, "captions": captions, "checkpoint": name}
        index = self.folder / "index.json"
        if not index.exists() or json.loads(index.read_text()) != told:
            self.folder.mkdir(parents=True, exist_ok=True)
            index.unlink(missing_ok=True)
            where = next(model.network.parameters()).device

            def latents(of: int, row: int) -> dict[str, Tensor | None]:
                image = to_float(sets[of].tensor([row])).to(where)
                return {f"latents-{of}": torch.stack(model.moments(image), dim=1)}

            with torch.no_grad(), device.autocast(kind, where):
                for of, each in enumerate(sets):
                    self._fill(len(each), partial(latents, of))
                self._fill(len(captions), lambda row: vars(model.embed([captions[row]])))
            index.write_text(json.dumps(told))
        self.files = {path.stem: np.load(path, mmap_mode="r") for path in self.folder.glob("*.npy")}

    def _fill(self, count: int, make: Callable[[int], Mapping[str, Tensor | None]]) -> None:
        """Write files of `count` rows, one row after another.

        Args:
            count: of rows.
            make: row -> the row (1, ...) of each file, by its name; None for no file.
        """
        written: dict[str, np.memmap] = {}
        for row in range(count):
            for name, made in make(row).items():
                if made is None:
                    continue
                value = made[0].float().cpu().numpy()
                if name not in written:
                    path = self.folder / f"{name}.npy"
                    path.unlink(missing_ok=True)
                    shape = (count, *value.shape)
                    written[name] = np.lib.format.open_memmap(path, "w+", value.dtype, shape)
                written[name][row] = value
        for file in written.values():
            file.flush()

    def __len__(self) -> int:
        return sum(len(texts) for texts in self.texts)

    def latents(self, pictures: Sequence[int], of: int = 0) -> tuple[Tensor, Tensor]:
        """Return mean and deviation (B, C, h, w) of the latents of these pictures of a set."""
        rows = np.array(self.files[f"latents-{of}"][list(pictures)])
        mean, deviation = torch.from_numpy(rows).unbind(1)
        return mean, deviation

    def embedded(self, captions: Sequence[str]) -> Embedded:
        """Return captions of the data set, or "", as the network reads them."""
        rows = [self.rows[caption] for caption in captions]
        told = {
            name: torch.from_numpy(np.array(self.files[name][rows]))
            for name in ("vector", "tokens")
            if name in self.files
        }
        return Embedded(**told)
