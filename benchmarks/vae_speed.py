"""Speed of training a VAE: our loop against pythae's, with the same networks, batch and pictures.

Two pairs of networks, in turn: pythae's convolutional ones for MNIST, told by its documentation and
used by its reproductions, and the smaller ones of our recipe `vae`. Either side trains them as its
users would, at its defaults: pythae's VAE by its trainer (float32, Adam, pictures as float32 in
memory, one by one through PyTorch's DataLoader); our VAE by our loop (the number format, memory
layout and way of convolving that pay on this machine, fused Adam, a running average of the weights,
log and progress, pictures memory-mapped as uint8). Both begin with the same weights and have the
likelihood of a Gaussian decoder.

The sides take turns, a pass over the pictures each, in one process; the first rounds are not
counted; the median round is shown, with the slowest and the fastest, and the median of the rounds'
ratios with the least and the greatest. Neither is charged for saving.

    python -m pip install -r benchmarks/requirements.txt && python -m pip install --no-deps pythae
    python benchmarks/vae_speed.py
"""

import argparse
import copy
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from pythae.data.preprocessors import DataProcessor
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.models.nn.benchmarks.mnist import Decoder_Conv_AE_MNIST, Encoder_Conv_VAE_MNIST
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor, nn

from trilemma import data as pictures
from trilemma import device, stepping
from trilemma.data import Dataset
from trilemma.models import autoencoder
from trilemma.networks import convnet
from trilemma.run import Run
from trilemma.settings import Length, Settings

WHERE = torch.device("cpu")
LATENT = 16
Nets = tuple[nn.Module, nn.Module]


class TheirEncoderForOurs(nn.Module):
    """pythae's encoder, called as our VAE calls one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        told = self.network(image)
        return torch.cat([told.embedding, told.log_covariance], dim=1)


class TheirDecoderForOurs(nn.Module):
    """pythae's decoder, whose pictures are in [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        return 2 * self.network(latent).reconstruction - 1


class OurEncoderForTheirs(BaseEncoder):
    """Our encoder, called as pythae's VAE calls one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> ModelOutput:
        mean, log_variance = self.network(x, x[:, :0, 0, 0]).chunk(2, dim=1)
        return ModelOutput(embedding=mean, log_covariance=log_variance)


class OurDecoderForTheirs(BaseDecoder):
    """Our decoder, called as pythae's VAE calls one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.network(z, z[:, :0]))


def networks(shape: tuple[int, int, int]) -> dict[str, tuple[Nets, Nets]]:
    """Return each pair of encoder and decoder, for them and for us."""
    config = VAEConfig(input_dim=shape, latent_dim=LATENT)
    theirs = Encoder_Conv_VAE_MNIST(config), Decoder_Conv_AE_MNIST(config)
    ours = (
        convnet.Encoder(shape, 2 * LATENT, channels=32),
        convnet.Decoder(shape, LATENT, channels=32),
    )
    return {
        "pythae's for MNIST": (
            theirs,
            (TheirEncoderForOurs(theirs[0]), TheirDecoderForOurs(theirs[1])),
        ),
        "those of our `vae`": ((OurEncoderForTheirs(ours[0]), OurDecoderForTheirs(ours[1])), ours),
    }


def theirs(nets: Nets, data: Dataset, batch: int, folder: Path) -> Callable[[], float]:
    """Return a function that trains once over the pictures and returns the seconds it took."""
    processor = DataProcessor()
    images = processor.process_data(data.tensor(slice(None)).float() / 255)
    trainer = BaseTrainer(
        VAE(VAEConfig(input_dim=data.shape, latent_dim=LATENT), *nets),
        processor.to_dataset(images),
        training_config=BaseTrainerConfig(
            output_dir=str(folder), per_device_train_batch_size=batch, no_cuda=True
        ),
    )
    trainer.prepare_training()

    def once() -> float:
        start = time.perf_counter()
        trainer.train_step(epoch=1)
        return time.perf_counter() - start

    return once


def ours(
    nets: Nets, data: Dataset, batch: int, folder: Path, precision: str
) -> Callable[[], float]:
    """Return a function that trains once over the pictures and returns the seconds it took."""
    model = autoencoder.VAE(*nets, latent=LATENT, likelihood="gaussian")
    device.prepare(model, WHERE, device.dtype(precision, WHERE))
    settings = Settings(batch=batch, precision=precision, grids=0)
    about = {"recipe": "vae", "data": data.name, "size": data.shape[1], "seed": 0}
    spec = {"run": about, "model": {}}
    run = Run(model, spec, settings, Length(steps=1), data, folder, 0, WHERE)
    stream = pictures.batches(data, batch, seed=0)

    def once() -> float:
        run.length = Length(images=run.progress.seen + len(data))
        before = run.progress.elapsed
        stepping.loop(run, stream, threading.Event())
        return run.progress.elapsed - before

    return once


def told(values: list[float], digits: int) -> str:
    """Return the median of sorted values, with the least and the greatest."""
    least, middle, most = (
        f"{value:.{digits}f}" for value in (values[0], statistics.median(values), values[-1])
    )
    return f"{middle} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64, help="64 is pythae's default")
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds not counted")
    args = parser.parse_args()

    logging.disable(logging.INFO)
    torch.manual_seed(0)
    count = args.batch * args.steps
    data = pictures.load("fashion")
    assert count <= len(data), f"{count} pictures are asked for, and there are {len(data)}"
    data = replace(data, images=data.images[:count], label=None, label_names=[])
    formats = ["auto"] + ["fp32"] * (device.dtype("auto", WHERE) != torch.float32)
    print(
        f"{device.name(WHERE)}, {torch.get_num_threads()} threads; torch {torch.__version__}; "
        f"{count} pictures of 1x28x28 a round, batch {args.batch}, median of {args.rounds} rounds; "
        f"ours multiplies in {str(device.dtype('auto', WHERE)).removeprefix('torch.')}"
    )
    print("\n| networks | parameters | | images/s | ratio |\n|---|---|---|---|---|")
    for name, (for_them, for_us) in networks(data.shape).items():
        size = sum(p.numel() for net in for_us for p in net.parameters())
        assert size == sum(p.numel() for net in for_them for p in net.parameters())
        took: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            sides = {"pythae": theirs(copy.deepcopy(for_them), data, args.batch, Path(folder))}
            for precision in formats:
                side = "ours" if precision == "auto" else f"ours, {precision}"
                nets, out = copy.deepcopy(for_us), Path(folder) / side
                sides[side] = ours(nets, data, args.batch, out, precision)
            for round in range(-args.warmup, args.rounds):
                for side, once in sides.items():
                    seconds = once()
                    if round >= 0:
                        took.setdefault(side, []).append(seconds)
        for side, seconds in took.items():
            rates = sorted(count / one for one in seconds)
            ratios = sorted(a / b for a, b in zip(took["pythae"], seconds, strict=True))
            row = f"| {name} | {size:,} | {side} | {told(rates, 0)} | {told(ratios, 2)} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
