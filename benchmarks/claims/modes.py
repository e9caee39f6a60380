"""Modes recovered: 25 Gaussians on a grid, and a thousand stacked kinds of clothes.

The claim: GANs lose modes, Wasserstein GANs lose fewer, VAEs lose none and are blurry between them.
Two sets with known modes, as in Lin et al. 2018, "PacGAN", section 4:

- grid: 25 Gaussians of deviation 0.05 at {-2, -1, 0, 1, 2}^2, in units of 2.5. A drawn point is of
  high quality within three deviations of a centre; a centre is recovered when one is.
- stacked: three pictures of Fashion-MNIST as the channels of one, 10^3 modes. A classifier trained
  here tells which; a mode is recovered when a drawn picture is of it.

All adversarial rows are the package's own GAN with the same networks, batch and images seen; their
phases are taken as the training loop takes them. Prints one markdown table a set.

    python benchmarks/claims/modes.py --images 2000000 --seeds 3
"""

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma import data as pictures
from trilemma.batch import Batch, Condition, Rng
from trilemma.model import Model
from trilemma.models.autoencoder import VAE
from trilemma.models.gan import GAN
from trilemma.networks import convnet, dcgan
from trilemma.training import only_these_learn

BATCH, SIDE, DEVIATION, UNIT = 256, 5, 0.05, 2.5
GAMES = {
    "GAN": {"game": "non-saturating"},
    "WGAN": {"game": "wasserstein", "clip": 0.05, "critic_steps": 5},
    "WGAN-GP": {"game": "wasserstein", "penalty": "gradient", "weight": 1.0, "critic_steps": 5},
    "relativistic, R1 + R2": {"game": "relativistic", "penalty": "r1+r2", "weight": 0.05},
}


def mlp(inputs: int, outputs: int, width: int = 128) -> nn.Sequential:
    """Three hidden layers."""
    layers: list[nn.Module] = []
    for before in (inputs, width, width):
        layers += [nn.Linear(before, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class PointGenerator(nn.Module):
    """Maps latents to points (B, 2, 1, 1)."""

    latent, classes, attributes = 2, 0, 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(2, 2)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        return self.layers(latent)[:, :, None, None]


class PointCritic(nn.Module):
    """Maps points to `outputs` numbers: a score, or a VAE's mean and log-variance."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.layers = mlp(2, outputs)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        out = self.layers(image.flatten(1))
        return out[:, 0] if out.shape[1] == 1 else out


def grid_points(rng: Rng) -> Tensor:
    """Draw (B, 2, 1, 1) points of the 25 Gaussians, one for each stream."""
    centre = rng.integers(SIDE, 2).float() - SIDE // 2
    return ((centre + DEVIATION * rng.normal(2)) / UNIT)[:, :, None, None]


def grid_score(drawn: Tensor) -> tuple[int, float]:
    """Return modes recovered and the high-quality share of points."""
    points = drawn.flatten(1) * UNIT
    centre = points.round().clamp(-(SIDE // 2), SIDE // 2)
    good = (points - centre).norm(dim=1) < 3 * DEVIATION
    return len(torch.unique(centre[good], dim=0)), good.float().mean().item()


def fit(model: Model, source: Callable[[Rng], Tensor], images: int, rate: float) -> None:
    """Take the model's phases in turn until `images` have been seen."""
    phases = model.phases()
    optimizers: dict[str, torch.optim.Optimizer] = {
        phase.name: torch.optim.Adam(
            [p for m in phase.modules for p in m.parameters()], rate, (0.5, 0.9)
        )
        for phase in phases
    }
    for step in range(images // BATCH):
        seeds = range(step * BATCH, (step + 1) * BATCH)
        real = source(Rng([seed + 2**40 for seed in seeds]))
        batch = Batch(real, Condition(BATCH), step * BATCH, Rng(seeds))
        for phase in phases:
            if step % phase.every:
                continue
            with only_these_learn(model, phase.modules, optimizers):
                phase.loss(batch)["loss"].backward()
            optimizers[phase.name].step()
            optimizers[phase.name].zero_grad()
            if phase.after is not None:
                phase.after()


def draw(model: Model, n: int) -> Iterator[Tensor]:
    """Draw n pictures in batches."""
    model.eval()
    with torch.inference_mode():
        for start in range(0, n, 1000):
            rng = Rng(range(start, min(n, start + 1000)))
            yield model.sample(Condition(len(rng)), rng)  # type: ignore[operator]


class Stacked:
    """Clothes in three channels, and a classifier that tells the kind in each."""

    def __init__(self, images: int) -> None:
        data = pictures.load("fashion", split="train")
        self.images = F.pad(data.tensor(slice(None)).float() / 127.5 - 1, (2, 2, 2, 2), value=-1)
        label = torch.from_numpy(data.label)
        self.classify = dcgan.Critic((1, 32, 32), 32, norm="batch")
        self.classify.score = nn.Linear(self.classify.score.in_features, 10)
        self.layers = nn.Sequential(self.classify.layers, self.classify.score)
        optimizer = torch.optim.Adam(self.layers.parameters(), 1e-3)
        for step in range(images // BATCH):
            rows = Rng(range(step * BATCH, (step + 1) * BATCH)).integers(len(self.images))
            F.cross_entropy(self.layers(self.images[rows]), label[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.layers.eval()

    def __call__(self, rng: Rng) -> Tensor:
        """Draw (B, 3, 32, 32)."""
        return self.images[rng.integers(len(self.images), 3).flatten()].view(-1, 3, 32, 32)

    @torch.inference_mode()
    def score(self, drawn: Tensor) -> tuple[int, float]:
        """Return modes recovered and the share whose three kinds are sure beyond 90 %."""
        told = self.layers(drawn.reshape(-1, 1, 32, 32)).softmax(1).view(-1, 3, 10)
        sure, kind = told.max(2)
        modes = torch.unique(kind @ torch.tensor([100, 10, 1]))
        return len(modes), (sure > 0.9).all(1).float().mean().item()


def points_of(name: str) -> Model:
    """Build a model of points."""
    if name == "VAE":
        return VAE(PointCritic(4), PointGenerator(), latent=2)
    return GAN(PointGenerator(), PointCritic(), **GAMES[name])


def clothes_of(name: str) -> Model:
    """Build a model of stacked clothes."""
    shape = (3, 32, 32)
    if name == "VAE":
        return VAE(convnet.Encoder(shape, 128, 32), convnet.Decoder(shape, 64, 32), latent=64)
    return GAN(dcgan.Generator(shape, 64, 32), dcgan.Critic(shape, 32, norm="none"), **GAMES[name])


def main() -> None:
    """Train, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=["grid", "stacked"])
    options = parser.parse_args()
    for name in options.sets:
        stacked = Stacked(min(options.images, 200_000)) if name == "stacked" else None
        source, score = (stacked, stacked.score) if stacked else (grid_points, grid_score)
        build, n, most = (clothes_of, 26_000, 1000) if stacked else (points_of, 2500, 25)
        print(f"\n{name}: {options.images:,} images, {options.seeds} seeds, {n:,} drawn\n")
        print(f"| model | modes of {most} | high quality |\n|---|---|---|")
        for row in [*GAMES, "VAE"]:
            found = []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                model = build(row).train()
                fit(model, source, options.images, 2e-4 if stacked else 1e-3)
                found.append(score(torch.cat(list(draw(model, n)))))
            modes, share = (statistics.mean(column) for column in zip(*found, strict=True))
            print(f"| {row} | {modes:.1f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
