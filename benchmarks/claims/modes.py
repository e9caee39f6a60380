"""Claim 1: GANs lose modes, Wasserstein GANs fewer, VAEs and flows none but draw between them.

Two sets with known modes, as in Lin et al. (2018), "PacGAN: The Power of Two Samples in Generative
Adversarial Networks", section 4; the flow is Dinh et al.'s and Kingma and Dhariwal's:

- points: 25 Gaussians of deviation 0.05 at {-2, -1, 0, 1, 2}^2 (twice as near each other as there).
  A drawn point is good within three deviations of a centre; a mode is recovered when a fifth of its
  share of 2,500 are good points there. (One, as in that paper, even noise has everywhere.)
- clothes: three pictures of Fashion-MNIST (14 pixels, in a border of 1) as the channels of one,
  10^3 modes. A classifier trained here tells the kinds; a picture is good when it is more than 90 %
  sure in all three channels, and a mode is recovered when a good picture of it is drawn.

All models are the package's own, and each trains for the same time of one processor core (which
other work on the machine does not spend); phases are taken as the training loop takes them, without
averaged weights. The GANs share networks, batch and Adam (betas 0.5 and 0.9; rate 1e-3 on points,
4e-4 on clothes; 1e-3 for VAE and flow); the Wasserstein critics take five steps for one of the
generator. WGAN-GP's penalty weighs 10 on clothes, as in its paper, and 0.1 on points, as in its
authors' code for them (gan_toy.py); WGAN's weights are clipped to 0.01 on clothes, the paper's, and
to 0.05 on points. Beside them stand real test pictures and even noise, the most and the least.

    python benchmarks/claims/modes.py
"""

import statistics
import time

import common
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch import Tensor, nn

from trilemma import data as pictures
from trilemma.batch import Batch, Condition, Rng, to_float
from trilemma.data import Dataset
from trilemma.model import Model
from trilemma.models.autoencoder import VAE
from trilemma.models.flow import Flow
from trilemma.models.gan import GAN
from trilemma.networks import convnet, coupling, dcgan
from trilemma.stepping import only_these_learn

SIDE, DEVIATION, UNIT = 5, 0.05, 2.5  # points are kept in units of UNIT: within [-1, 1]
SHAPE = (3, 16, 16)
SURE = 0.9
MODELS = ("GAN", "WGAN", "WGAN-GP", "VAE", "flow")


def gan(name: str, generator: nn.Module, critic: nn.Module, clip: float, weight: float) -> GAN:
    """Build a GAN, `clip` being WGAN's and `weight` of WGAN-GP's penalty."""
    if name == "GAN":
        return GAN(generator, critic, "non-saturating")
    if name == "WGAN":
        return GAN(generator, critic, "wasserstein", clip=clip, critic_steps=5)
    return GAN(generator, critic, "wasserstein", "gradient", weight, critic_steps=5)


class Points:
    """The grid of Gaussians."""

    batch, drawn, modes = 256, 2500, SIDE**2

    def __call__(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw (count, 2, 1, 1)."""
        centre = torch.randint(SIDE, (count, 2), generator=rng) - SIDE // 2
        noise = torch.randn(count, 2, generator=rng)
        return ((centre + DEVIATION * noise) / UNIT)[:, :, None, None]

    real = __call__

    def score(self, drawn: Tensor) -> tuple[int, float]:
        """Return modes recovered and the share of good points."""
        points = drawn.flatten(1) * UNIT
        centre = points.round().clamp(-(SIDE // 2), SIDE // 2)
        good = (points - centre).norm(dim=1) < 3 * DEVIATION
        _, counts = torch.unique(centre[good], dim=0, return_counts=True)
        least = len(drawn) / self.modes / 5
        return int((counts >= least).sum()), good.float().mean().item()

    def build(self, name: str) -> Model:
        if name == "VAE":
            return VAE(PointCritic(4), PointGenerator(), latent=2)
        if name == "flow":
            return Flow(PointFlow())  # type: ignore[arg-type]
        return gan(name, PointGenerator(), PointCritic(), clip=0.05, weight=0.1)

    def rate(self, name: str) -> float:
        return 1e-3

    def show(self, drawn: Tensor, axes: pyplot.Axes) -> None:
        axes.scatter(*(UNIT * drawn.flatten(1)).T, s=1, alpha=0.3)
        axes.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")


class Clothes:
    """Clothes in three channels, and a classifier that tells the kind in each."""

    batch, drawn, modes = 64, 20_000, 1000

    def __init__(self, steps: int) -> None:
        self.known, self.unseen = (
            _small(pictures.load("fashion", split=split)) for split in ("train", "test")
        )
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(self.layers.parameters(), 2e-3)
        images, labels = self.known
        for _ in range(steps):
            rows = torch.randint(len(images), (128,))
            F.cross_entropy(self.layers(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.layers.eval()
        images, labels = self.unseen
        with torch.inference_mode():
            right = (self.layers(images).argmax(1) == labels).float()
        self.accuracy = right.mean().item()

    def __call__(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw (count, 3, 16, 16)."""
        return _stacked(self.known[0], count, rng)

    def real(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw pictures that no model and no classifier has seen."""
        return _stacked(self.unseen[0], count, rng)

    @torch.inference_mode()
    def score(self, drawn: Tensor) -> tuple[int, float]:
        """Return modes recovered and the share of good pictures."""
        parts = drawn.reshape(-1, 1, *SHAPE[1:]).split(3000)
        told = torch.cat([self.layers(part).softmax(1) for part in parts]).view(-1, 3, 10)
        sure, kind = told.max(2)
        good = (sure > SURE).all(1)
        modes = torch.unique(kind[good] @ torch.tensor([100, 10, 1]))
        return len(modes), good.float().mean().item()

    def build(self, name: str) -> Model:
        if name == "VAE":
            encoder, decoder = convnet.Encoder(SHAPE, 128, 32), convnet.Decoder(SHAPE, 64, 32)
            return VAE(encoder, decoder, latent=64)
        if name == "flow":
            return Flow(coupling.Glow(SHAPE, levels=2, steps=8, channels=64))
        generator, critic = dcgan.Generator(SHAPE, 64, 32), dcgan.Critic(SHAPE, 32, norm="none")
        return gan(name, generator, critic, clip=0.01, weight=10.0)

    def rate(self, name: str) -> float:
        return 1e-3 if name in ("VAE", "flow") else 4e-4

    def show(self, drawn: Tensor, axes: pyplot.Axes) -> None:
        rows = [torch.cat(list(row), dim=2) for row in drawn[:36].split(6)]
        axes.imshow((torch.cat(rows, dim=1).permute(1, 2, 0) + 1).clamp(0, 2) / 2)


def _small(data: Dataset) -> tuple[Tensor, Tensor]:
    images = F.avg_pool2d(to_float(data.tensor(slice(None))), 2)
    return F.pad(images, (1, 1, 1, 1), value=-1.0), torch.tensor(data.label)


def _stacked(images: Tensor, count: int, rng: torch.Generator) -> Tensor:
    return images[torch.randint(len(images), (3 * count,), generator=rng)].view(count, *SHAPE)


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


class PointFlow(nn.Module):
    """Glow's steps on points."""

    shape, top = (2, 1, 1), 2

    def __init__(self, steps: int = 8, width: int = 128) -> None:
        super().__init__()
        layers: list[coupling.Bijection] = []
        for _ in range(steps):
            network = nn.Sequential(
                nn.Conv2d(1, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
                nn.Conv2d(width, 2, 1),
            )  # fmt: skip
            coupled = coupling.Coupling(2, network)
            layers += [coupling.ActNorm(2), coupling.InvertibleConv(2), coupled]
        self.chain = coupling.Chain(*layers)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.chain(x)
        return y.flatten(1), log_det

    def forward(self, latent: Tensor) -> Tensor:
        return self.chain.inverse(latent[:, :, None, None])


def fit(model: Model, data: Points | Clothes, rate: float, seconds: float, seed: int) -> int:
    """Take the model's phases in turn for so long; return how many images it has seen."""
    phases = model.train().phases()
    optimizers: dict[str, torch.optim.Optimizer] = {
        phase.name: torch.optim.Adam(
            [p for m in phase.modules for p in m.parameters()], rate, (0.5, 0.9), fused=True
        )
        for phase in phases
    }
    order, step, start = torch.Generator().manual_seed(seed), 0, time.process_time()
    while time.process_time() - start < seconds:
        seen = step * data.batch
        rng = Rng(range(seen, seen + data.batch))
        batch = Batch(data(data.batch, order), Condition(data.batch), seen, rng)
        for phase in phases:
            if step % phase.every:
                continue
            with only_these_learn(model, phase.modules, optimizers):
                phase.loss(batch)["loss"].backward()
            optimizers[phase.name].step()
            optimizers[phase.name].zero_grad()
            if phase.after is not None:
                phase.after()
        step += 1
    return step * data.batch


@torch.inference_mode()
def draw(model: Model, n: int) -> Tensor:
    """Draw n pictures."""
    model.eval()
    rngs = [Rng(range(start, min(n, start + 1000))) for start in range(0, n, 1000)]
    return torch.cat([model.sample(Condition(len(rng)), rng) for rng in rngs])  # type: ignore[operator]


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument(
        "--minutes", type=float, default=1.2, help="of a core, for each of ten models"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each model")
    parser.add_argument("--classifier-steps", type=int, default=3000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    clothes = Clothes(given.classifier_steps)
    common.tell("classifier", accuracy=clothes.accuracy)
    sets = {"points": Points(), "clothes": clothes}
    ways = [*MODELS, "real", "noise"]
    cells: dict[str, list[str]] = {way: [] for way in ways}
    figure, axes = pyplot.subplots(
        2, len(MODELS) + 1, figsize=(13, 4.6), layout="constrained", squeeze=False
    )
    for row, (title, data) in zip(axes, sets.items(), strict=True):
        for column, way in enumerate(ways):
            found, seen = [], 0
            for seed in range(given.seeds if way in MODELS else 1):
                torch.manual_seed(seed)
                if way == "real":
                    drawn = data.real(data.drawn, torch.Generator().manual_seed(1))
                elif way == "noise":
                    drawn = 2 * torch.rand_like(data(data.drawn, torch.Generator())) - 1
                else:
                    model = data.build(way)
                    seen = fit(model, data, data.rate(way), 60 * given.minutes, seed)
                    drawn = draw(model, data.drawn)
                found.append(data.score(drawn))
                modes, share = found[-1]
                common.tell(f"{title}, {way}, seed {seed}", seen=seen, modes=modes, good=share)
            counts, shares = zip(*found, strict=True)
            spread = f" ({min(counts)} to {max(counts)})" if len(counts) > 1 else ""
            cells[way] += [
                f"{seen:,}" if way in MODELS else "-",
                f"{statistics.mean(counts):.4g}{spread}",
                f"{np.mean(shares):.0%}",
            ]
            if column < len(row):
                data.show(drawn, row[column])
                row[column].set(title=way, xticks=[], yticks=[])
    given.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out / "modes.png", dpi=120)
    common.publish(
        f"{given.minutes:g} minutes of a core a model and set, seeds: {given.seeds}; "
        f"{Points.drawn:,} points and {Clothes.drawn:,} pictures drawn; the classifier is "
        f"right on {clothes.accuracy:.1%} of the test pictures.",
        ("", "points seen", "modes of 25", "good", "clothes seen", "modes of 1000", "good"),
        [(way, *cells[way]) for way in ways],
    )


if __name__ == "__main__":
    main()
