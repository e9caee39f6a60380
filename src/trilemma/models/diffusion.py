"""Diffusion models: learn to remove noise, then make pictures of noise.

    x_t = alpha(t) x_0 + sigma(t) noise                 (the schedule)
    F(c_in x_t, t, condition) ~ a x_0 + b noise         (the target)
    loss = E_t,noise [ w(t) |F - a x_0 - b noise|^2 ]   (the weight, and how often each t is drawn)

Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", algorithms 1 and 2, is the
schedule `Linear` with the noise target; flow matching (Lipman et al. 2023) and rectified flow (Liu
et al. 2023) are the schedule `Straight` with the straight target. Scaling the input to unit
variance, c_in = 1 / sqrt(alpha^2 data_std^2 + sigma^2), is from Karras et al. 2022, "Elucidating
the Design Space of Diffusion-Based Generative Models", table 1; the rest of that table is the
preconditioned target. Score models (Song & Ermon 2019, Song et al. 2021) are the noise target,
whose error is the score's times sigma, over `VarianceExploding` and its kin.

With learned variances (Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic
Models", section 3.1) the network's output has twice the channels: the second half says where a
step's variance lies. It learns from the bound on the likelihood, which x_0 does not feel:

    loss = |F - a x_0 - b noise|^2 + 0.001 T L_t / log 2        (per number, L_t in nats)

The loss "bound" is T L_t / log 2 alone, which x_0 and the variance both learn from, for the best
likelihood; it varies so much over t that times are to be drawn by importance (their section 3.3).

What stands in brackets above is told in the files of `trilemma.diffusion`: schedules, targets,
weights, times; and how a denoiser draws, in solvers, grids and guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng, dequantise
from trilemma.codecs import Latents, Pixels, encoded
from trilemma.conditioning import Conditioner, Labels
from trilemma.diffusion import inpainting, inversion, likelihood
from trilemma.diffusion.grids import CLEANEST, times_of
from trilemma.diffusion.guidance import Denoiser, Guidance, clipped, guided
from trilemma.diffusion.levels import combine
from trilemma.diffusion.pairing import PAIRINGS
from trilemma.diffusion.schedules import Linear, Schedule
from trilemma.diffusion.solvers import SOLVERS, check, last
from trilemma.diffusion.targets import TARGETS, clean
from trilemma.diffusion.times import Importance, Uniform
from trilemma.diffusion.weights import LOSSES, Even, Uncertainty
from trilemma.model import Losses, Model, Phase
from trilemma.networks.layers import Embedded

if TYPE_CHECKING:
    from trilemma.models.distillation import Objective

SOLVER, STEPS = "dpmpp_2m", 20  # of `sample`, if nothing is said
BOUND_WEIGHT = 1e-3  # lambda of Nichol & Dhariwal 2021


class Diffusion(Model):
    """A denoiser: how it learns (`loss`), what it expects (`denoise`), and drawing (`sample`).

    After these stands what else a denoiser can do, each in a few lines or a module of its own.

    Args:
        codec: the space it works in.
        network: `(x (B, C, H, W), time (B,), embedded) -> (B, C, H, W)`.
        conditioner: from Condition to Embedded; None for an unconditional model.
        schedule: (alpha, sigma) over time; Linear if None.
        target: what the network predicts: noise, image, velocity, straight or preconditioned.
        loss: l2, l1 or huber, or the bound, which has no weight.
        weight: of an error at a time; Even if None.
        times: which times training visits; Uniform if None.
        data_std: standard deviation of x_0, for c_in and the preconditioned target.
        uncertainty: learns how large the error is at a time, by which it is divided; or None.
        pairing: of noise with pictures: independent, or optimal (see `diffusion.pairing`).
        learn_variance: the network says the variance of a step too, in as many channels again.
        dequantise: spread the pictures' levels over their cells, so that they have a density.
        scale_input: bring what the network sees to unit variance, c_in; else it sees x_t.
        objective: what is learned instead of denoising: consistency, or a teacher's steps.

    Attributes:
        discrete: times are those of T steps; then the likelihood is a bound over the steps.
        share: where the last `denoise` saw the variance between small (0) and large (1).
    """

    training_only = ("objective",)
    any_size = True

    def __init__(
        self,
        codec: Pixels | Latents,
        network: nn.Module,
        conditioner: Conditioner | None = None,
        schedule: Schedule | None = None,
        target: str = "noise",
        loss: str = "l2",
        weight: Callable | None = None,
        times: Callable[[Rng, Schedule], Tensor] | None = None,
        data_std: float = 1.0,
        uncertainty: Uncertainty | None = None,
        pairing: str = "independent",
        learn_variance: bool = False,
        dequantise: bool = False,
        scale_input: bool = True,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.codec = codec
        self.network = network
        self.conditioner = conditioner or Labels(0, 0)
        self.schedule = schedule or Linear()
        self.target = partial(TARGETS[_known("target", target, TARGETS)], data_std=data_std)
        losses = {**LOSSES, "bound": None}
        self.error = losses[_known("loss", loss, losses)]
        self.weight = weight or Even()
        self.times = times or Uniform()
        self.data_std = data_std
        self.uncertainty = uncertainty
        self.pair = PAIRINGS[_known("pairing", pairing, PAIRINGS)]
        self.learn_variance, self.dequantise = learn_variance, dequantise
        self.scale_input = scale_input
        self.objective = objective
        self.share: Tensor | None = None
        self.steps: int | None = getattr(self.times, "steps", None)
        if (learn_variance or self.error is None) and self.steps is None:
            raise ValueError(
                "learn_variance and the loss 'bound' are of steps, and the model's times are not "
                "in steps; give it times of type diffusion.times.Uniform with steps = 1000"
            )
        if self.error is None and uncertainty is not None:
            raise ValueError("the loss 'bound' weighs all times itself; leave out uncertainty")
        alpha, sigma = self.schedule(torch.ones(()))
        a, b = self.target(alpha, sigma)
        if b * alpha - a * sigma == 0:
            raise ValueError(
                f"target '{target}' says nothing of the picture at t = 1, where "
                f"{type(self.schedule).__name__} leaves none of it; use velocity or straight"
            )

    def begin(self) -> bool:
        """Take a teacher's weights, if there is one; return whether the codec's are among them."""
        return self.objective is not None and self.objective.begin(self)

    def phases(self) -> list[Phase]:
        """Return the one phase, denoising, or those of the objective."""
        if self.objective is not None:
            return self.objective.phases(self)
        modules = [self.network, self.conditioner]
        if self.uncertainty is not None:
            modules.append(self.uncertainty)
        after = self.times.update if isinstance(self.times, Importance) else None
        return [Phase("denoise", self.loss, modules, after=after)]

    def loss(self, batch: Batch) -> Losses:
        """Return the weighted error of the network's output at random times."""
        rng = batch.rng
        if self.dequantise:
            x0 = self.codec.encode(dequantise(batch.image, rng.uniform(*batch.image.shape[1:])))
        else:
            x0 = encoded(self.codec, batch)
        t = self.times(rng, self.schedule)  # (B,)
        of_a_kind = batch.condition.label if getattr(self.conditioner, "classes", 0) else None
        noise = self.pair(rng.normal(*x0.shape[1:]), x0, of_a_kind)
        alpha, sigma = (_like(v, x0) for v in self.schedule(t))
        a, b = ab = self.target(alpha, sigma)
        x = alpha * x0 + sigma * noise
        embedded = self.conditioner(batch.condition, rng, batch.image)
        output, share = self._estimate(x, t, self._scale(alpha, sigma), embedded)
        if self.error is None:
            bound = self._bound(x0, clean(x, output, alpha, sigma, ab), share, t)
            return self._averaged(t, {"loss": bound, "bound": bound})
        error = self.weight(alpha, sigma, ab) * self.error(output, a * x0 + b * noise)
        told = {"loss": error.flatten(1).mean(1)}  # (B,) each
        if self.uncertainty is not None:
            u, told["error"] = self.uncertainty(t), told["loss"]
            told["loss"] = told["error"] * (-u).exp() + u
        if self.learn_variance:
            guess = clean(x, output.detach(), alpha, sigma, ab)
            told["bound"] = self._bound(x0, guess, share, t)
            told["loss"] = told["loss"] + BOUND_WEIGHT * told["bound"]
        return self._averaged(t, told)

    def _bound(self, x0: Tensor, guess: Tensor, share: Tensor | None, t: Tensor) -> Tensor:
        """Return T L_t / log 2 (B,) of an expected x_0: on average bits per dimension, but L_T."""
        assert self.steps is not None  # `__init__` has seen to it
        k = (t.double() * self.steps).round().long()
        v = 0.0 if share is None else share
        nats = likelihood.step_nats(x0, guess, v, k, self.schedule, self.steps)
        return self.steps * nats.flatten(1).mean(1) / math.log(2)

    def _averaged(self, t: Tensor, told: Losses) -> Losses:
        """Return the means of losses (B,) at times t (B,), which importance sampling learns of."""
        if not isinstance(self.times, Importance):
            return {name: each.mean() for name, each in told.items()}
        if self.training:
            self.times.tell(t, told["loss"])
        weight = self.times.weight(t)
        losses = {name: (weight * each).mean() for name, each in told.items()}
        return {**losses, "known": self.times.known, "visited": self.times.visited}

    def _scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return c_in."""
        if not self.scale_input:
            return torch.ones_like(alpha)
        return (alpha**2 * self.data_std**2 + sigma**2).rsqrt()

    def _estimate(
        self, x: Tensor, t: Tensor, scale: float | Tensor, embedded: Embedded
    ) -> tuple[Tensor, Tensor | None]:
        """Return F (B, ...), and the share (B, ...) of the large variance if it is learned."""
        output = self.network(scale * x, t, embedded).to(x.dtype)
        if not self.learn_variance:
            return output, None
        if output.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"the network gives {output.shape[1]} channels for {x.shape[1]}; learn_variance "
                f"needs twice as many: --set model.network.out_channels={2 * x.shape[1]}, or in a "
                'recipe out_channels = "@channels * 2"'
            )
        output, between = output.chunk(2, dim=1)
        return output, (1 + between) / 2

    def denoise(self, x: Tensor, t: float | Tensor, embedded: Embedded) -> Tensor:
        """Return the x_0 (B, ...) that the network expects behind x_t, at one t or times (B,)."""
        if isinstance(t, Tensor):
            alpha, sigma = (_like(v, x) for v in self.schedule(t))
            output = self._network(x, t, self._scale(alpha, sigma), embedded)
            return clean(x, output, alpha, sigma, self.target(alpha, sigma))
        scale, of_x, of_output = _coefficients(self.schedule, self.target, self.data_std, t)
        scale = scale if self.scale_input else 1.0
        output = self._network(x, torch.full((len(x),), t, device=x.device), scale, embedded)
        return combine((of_x, x), (of_output, output))

    def _network(self, x: Tensor, t: Tensor, scale: float | Tensor, embedded: Embedded) -> Tensor:
        output, share = self._estimate(x, t, scale, embedded)
        self.share = None if share is None else share.detach()
        return output

    def denoiser(self, condition: Condition, guidance: float | Guidance = 1.0) -> Denoiser:
        """Return x_t, t -> x_0 under a condition, guided and kept within the codec's bounds.

        Raises:
            ValueError: guidance of a model that cannot be guided, or by what does not fit it.
        """
        asked = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        denoise = guided(self, condition, asked)
        return clipped(denoise, *self.codec.bounds) if self.codec.bounds else denoise

    def sample(
        self,
        condition: Condition,
        rng: Rng,
        *,
        solver: str = SOLVER,
        steps: int = STEPS,
        guidance: float | Guidance = 1.0,
        grid: str | Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        **own: Any,
    ) -> Tensor:
        """Draw images (B, C, H, W) in [-1, 1].

        Args:
            condition: what to draw; a label of None draws from all classes.
            rng: one stream per image.
            solver: one of `SOLVERS`.
            steps: of the solver, from noise to picture.
            guidance: how far the condition is overdone, 1 being not at all; or all that guides.
            grid: where the steps lie: one of `GRIDS`, or steps + 1 times that fall from 1 to 0; the
                solver's own if None.
            size: height and width of the images; those it was trained on if None.
            own: the solver's own options, such as ddim's eta.

        Raises:
            ValueError: an unknown solver or grid, an option that the solver does not have, fewer
                than one step, times that do not fall in so many steps, a size that is not two
                sides, or guidance of a model that cannot be guided.
        """
        own |= {"solver": solver, "steps": steps, "guidance": guidance, "grid": grid, "size": size}
        return self.codec.decode(last(self._walk(condition, rng, **own)))

    def sample_steps(self, condition: Condition, rng: Rng, **options: Any) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) in [-1, 1] after each step; arguments as `sample`."""
        for x in self._walk(condition, rng, **options):
            yield self.codec.decode(x)

    def own_options(self, chosen: Mapping[str, Any]) -> list[str]:
        """Return the names that `sample` takes beside its own: those of the chosen solver."""
        solver = chosen.get("solver", SOLVER)
        return list(SOLVERS[solver].options) if solver in SOLVERS else []

    def _walk(
        self,
        condition: Condition,
        rng: Rng,
        *,
        solver: str = SOLVER,
        steps: int = STEPS,
        guidance: float | Guidance = 1.0,
        grid: str | Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        begin: tuple[Tensor, float] | None = None,
        **own: Any,
    ) -> Iterator[Tensor]:
        """Yield the states (B, ...) that `sample` goes through, not decoded.

        Begins, instead of with noise, with images and a share of noise on them, as `vary`.
        """
        chosen = check(solver, own)
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1")
        if own.get("variance") == "learned":
            if not self.learn_variance:
                raise ValueError(
                    "variance 'learned' needs a model trained with learn_variance; use small or "
                    "large"
                )
            own["share"] = lambda: self.share
        if grid is None:
            times = chosen.grid(self.schedule, steps)
        else:
            times = times_of(grid, self.schedule, steps)
        denoise = self.denoiser(condition, guidance)
        if begin is not None:
            if size is not None:
                raise ValueError("what is like a picture has its size; leave size out")
            x, times = self._partway(*begin, times, rng)
        else:
            shape = self.codec.shape if size is None else self.codec.space(*_sides(size))
            _, sigma = self.schedule(times[:1])
            x = float(sigma) * rng.normal(*shape)
        yield from chosen.steps(denoise, x, times, self.schedule, rng, **own)

    def _partway(
        self, image: Tensor, share: float, times: Tensor, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """Return x (B, ...), images with a share of noise on them, and the times from there on."""
        if not 0 < share <= 1:
            raise ValueError(f"strength is {share}; expected more than 0 and at most 1")
        t = self.schedule.time(torch.tensor([1 / share - 1], dtype=torch.float64).log() * 2)
        alpha, sigma = self.schedule(t)
        x0 = self.codec.encode(image)
        x = float(alpha) * x0 + float(sigma) * rng.normal(*x0.shape[1:])
        return x, torch.cat([t, times[times < 0.999 * t]])

    def vary(
        self, image: Tensor, strength: float, condition: Condition, rng: Rng, **options: Any
    ) -> Tensor:
        """Draw images (B, C, H, W) in [-1, 1] that are like the given ones.

        Noise is added until it is a share `strength` = sigma / (alpha + sigma) of what is seen, and
        removed again: Meng et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic
        Differential Equations", algorithm 1. Options as `sample`; of its steps those are taken that
        lie below.

        Raises:
            ValueError: as `sample`; a strength of 0 or less or more than 1.
        """
        walk = self._walk(condition, rng, begin=(image, strength), **options)
        return self.codec.decode(last(walk))

    def inpaint(
        self,
        image: Tensor,
        mask: Tensor,
        condition: Condition,
        rng: Rng,
        *,
        steps: int = 25,
        resample: int = 10,
        guidance: float | Guidance = 1.0,
    ) -> Tensor:
        """Draw what is hidden of images (B, C, H, W) in [-1, 1], and keep the rest as it is.

        By `diffusion.inpainting.repaint`; a model that was trained with masks is told the mask and
        samples as ever.

        Args:
            image: what is hidden of it is not read.
            mask: (B, 1, H, W), 1 where it is hidden, 0 where it is kept.
            condition: what to draw.
            rng: one stream per image.
            steps: of the way from noise to picture.
            resample: how often each step is taken.
            guidance: as in `sample`.

        Raises:
            ValueError: as `sample`; resample below 1; a mask that is not of the images' size.
        """
        chosen: dict[str, Any] = {"steps": steps, "resample": resample, "guidance": guidance}
        return inpainting.inpaint(self, image, mask, condition, rng, **chosen)

    def restore(self, image: Tensor, deviation: Tensor) -> Tensor:
        """Return the expected clean images behind images (B, C, H, W) of noise deviations (B,).

        x + deviation noise is x_t / alpha at the time when sigma / alpha = deviation, and there the
        network's x_0 is the mean of all pictures that may lie behind: no other estimate has a
        smaller squared error. One network call, with nothing said of the picture.

        Raises:
            ValueError: the model draws latents, in which noise on a picture is not Gaussian.
        """
        if not isinstance(self.codec, Pixels):
            raise ValueError("it knows noise on latents, and this is noise on pictures")
        t = self.schedule.time(-2 * deviation.clamp(min=CLEANEST).log())  # (B,)
        alpha, _ = self.schedule(t)
        nothing = self.conditioner.nothing(Condition(len(image)))
        return self.codec.decode(self.denoise(_like(alpha, image) * image, t, nothing))

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the noise (B, ...) that `decode` makes them of."""
        return inversion.encode(self, image)

    def decode(self, latent: Tensor) -> Tensor:
        """Map noise (B, ...) to images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: noise of another shape.
        """
        return inversion.decode(self, latent)

    @property
    def discrete(self) -> bool:
        """Whether times are those of steps: then `log_prob` is of 8-bit pictures, and a bound."""
        return self.steps is not None

    @property
    def bound(self) -> bool:
        """Whether `log_prob` is a bound from below."""
        return self.discrete

    @property
    def likelihood_calls(self) -> int:
        """Network calls of `log_prob`; with their gradients where times are continuous."""
        return self.steps or 4 * likelihood.FLOW_STEPS

    def log_prob(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Return (B,) nats of images (B, C, H, W), of labels (B,) or with nothing said of them.

        With continuous times the density by the flow, else the bound by the steps.

        Raises:
            ValueError: as `diffusion.likelihood.log_prob`.
        """
        return likelihood.log_prob(self, image, label)


@lru_cache(maxsize=4096)
def _coefficients(
    schedule: Schedule, target: Callable, data_std: float, t: float
) -> tuple[float, float, float]:
    """Return c_in at one time, and the factors of x_t and of F in x_0: `targets.clean`."""
    alpha, sigma = schedule(torch.tensor(t, dtype=torch.float64))
    a, b = target(alpha, sigma)
    whole = b * alpha - a * sigma
    scale = (alpha**2 * data_std**2 + sigma**2).rsqrt()
    return float(scale), float(b / whole), float(-sigma / whole)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """Return (B,) values in x's type, with the dimensions of x."""
    return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _sides(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"size is {size}; expected height and width in pixels, such as [64, 96]")
    return size[0], size[1]


def _known(what: str, name: str, known: dict) -> str:
    if name not in known:
        raise ValueError(f"{what} '{name}' is not known; expected one of {', '.join(known)}")
    return name
