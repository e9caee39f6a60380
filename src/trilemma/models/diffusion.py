"""Diffusion models: learn to remove noise, then make pictures of noise.

    x_t = alpha(t) x_0 + sigma(t) noise                 (the schedule)
    F(c_in x_t, t, condition) ~ a x_0 + b noise         (the target)
    loss = E_t,noise [ w(t) |F - a x_0 - b noise|^2 ]   (the weight, and how often each t is drawn)

Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", algorithms 1 and 2, is the
schedule `Linear` with the noise target; flow matching (Lipman et al. 2023) and rectified flow (Liu
et al. 2023) are the schedule `Straight` with the straight target. Scaling the input to unit
variance, c_in = 1 / sqrt(alpha^2 data_std^2 + sigma^2), is from Karras et al. 2022, "Elucidating
the Design Space of Diffusion-Based Generative Models", table 1.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.codecs import Latents, Pixels
from trilemma.conditioning import Labels
from trilemma.diffusion.guidance import Denoiser, classifier_free, clipped
from trilemma.diffusion.schedules import Linear, Schedule
from trilemma.diffusion.solvers import CLEANEST, GRIDS, SOLVERS, heun, karras
from trilemma.diffusion.targets import TARGETS, clean
from trilemma.diffusion.times import Uniform
from trilemma.diffusion.weights import LOSSES, Even
from trilemma.model import Losses, Model, Phase
from trilemma.networks.layers import Embedded, check_shape

INVERSION_STEPS = 25  # of Heun's method, two network calls each, from picture to noise or back


class Diffusion(Model):
    """A denoiser and the ways to sample with it.

    Args:
        codec: the space it works in.
        network: `(x (B, C, H, W), time (B,), embedded) -> (B, C, H, W)`.
        conditioner: from Condition to Embedded; None for an unconditional model.
        schedule: (alpha, sigma) over time; Linear if None.
        target: what the network predicts: noise, image, velocity or straight.
        loss: l2, l1 or huber.
        weight: of an error at a time; Even if None.
        times: which times training visits; Uniform if None.
        data_std: standard deviation of x_0, for c_in.
    """

    def __init__(
        self,
        codec: Pixels | Latents,
        network: nn.Module,
        conditioner: Labels | None = None,
        schedule: Schedule | None = None,
        target: str = "noise",
        loss: str = "l2",
        weight: Callable | None = None,
        times: Callable[[Rng], Tensor] | None = None,
        data_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.codec = codec
        self.network = network
        self.conditioner = conditioner or Labels(0, 0)
        self.schedule = schedule or Linear()
        self.target = TARGETS[_known("target", target, TARGETS)]
        self.error = LOSSES[_known("loss", loss, LOSSES)]
        self.weight = weight or Even()
        self.times = times or Uniform()
        self.data_std = data_std
        alpha, sigma = self.schedule(torch.ones(()))
        a, b = self.target(alpha, sigma)
        if b * alpha - a * sigma == 0:
            raise ValueError(
                f"target '{target}' says nothing of the picture at t = 1, where "
                f"{type(self.schedule).__name__} leaves none of it; use velocity or straight"
            )

    def phases(self) -> list[Phase]:
        """Return the one phase: denoising."""
        return [Phase("denoise", self.loss, [self.network, self.conditioner])]

    def loss(self, batch: Batch) -> Losses:
        """Return the weighted error of the network's output at random times."""
        rng = batch.rng
        x0 = self.codec.encode(batch.image)
        t = self.times(rng)  # (B,)
        noise = rng.normal(*x0.shape[1:])
        alpha, sigma = (_like(v, x0) for v in self.schedule(t))
        a, b = ab = self.target(alpha, sigma)
        x = alpha * x0 + sigma * noise
        output = self._network(x, t, alpha, sigma, self.conditioner(batch.condition, rng))
        error = self.weight(alpha, sigma, ab) * self.error(output, a * x0 + b * noise)
        return {"loss": error.mean()}

    def _network(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, embedded: Embedded
    ) -> Tensor:
        scale = (alpha**2 * self.data_std**2 + sigma**2).rsqrt()
        return self.network(scale * x, t, embedded).to(x.dtype)

    def denoise(self, x: Tensor, t: float, embedded: Embedded) -> Tensor:
        """Return the x_0 (B, ...) that the network expects behind x_t at one time t."""
        time = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        alpha, sigma = (_like(v, x) for v in self.schedule(time))
        output = self._network(x, time, alpha, sigma, embedded)
        return clean(x, output, alpha, sigma, self.target(alpha, sigma))

    def denoiser(self, condition: Condition, guidance: float = 1.0) -> Denoiser:
        """Return x_t, t -> x_0 under a condition, guided and kept within the codec's bounds.

        Raises:
            ValueError: guidance of a model that cannot be guided.
        """
        given = self.conditioner(condition)
        if guidance == 1:
            denoise: Denoiser = lambda x, t: self.denoise(x, t, given)  # noqa: E731
        else:
            if not (self.conditioner.classes and self.conditioner.dropout):
                raise ValueError(
                    f"guidance {guidance} needs a model trained with labels and with "
                    "conditioner.dropout above 0; use guidance 1, or train such a model"
                )
            doubled = _stack(given, self.conditioner.nothing(condition))

            def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
                with_it, without = self.denoise(torch.cat([x, x]), t, doubled).chunk(2)
                return with_it, without

            denoise = classifier_free(both, guidance)
        return clipped(denoise, *self.codec.bounds) if self.codec.bounds else denoise

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the noise (B, ...) that `decode` makes them of.

        The probability-flow equation followed from picture to noise (Song et al. 2021, "Denoising
        Diffusion Implicit Models", section 4.3), with nothing said of the picture.
        """
        times = karras(self.schedule, INVERSION_STEPS)[:-1].flip(0)  # from all but clean to noise
        alpha, _ = self.schedule(times[:1])
        return self._flow(float(alpha) * self.codec.encode(image), times)

    def decode(self, latent: Tensor) -> Tensor:
        """Map noise (B, ...) to images (B, C, H, W) in [-1, 1] by the same equation.

        Raises:
            ValueError: noise of another shape.
        """
        check_shape("latents", latent, *self.codec.shape)
        return self.codec.decode(self._flow(latent, karras(self.schedule, INVERSION_STEPS)))

    def _flow(self, x: Tensor, times: Tensor) -> Tensor:
        rng = Rng(torch.zeros(len(x), dtype=torch.int64), x.device)  # heun draws nothing
        nothing = self.conditioner.nothing(Condition(len(x)))
        denoise: Denoiser = lambda x, t: self.denoise(x, t, nothing)  # noqa: E731
        return deque(heun(denoise, x, times, self.schedule, rng), maxlen=1).pop()

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
        alpha, sigma = (_like(v, image) for v in self.schedule(t))
        x = alpha * image
        nothing = self.conditioner.nothing(Condition(len(image)))
        output = self._network(x, t, alpha, sigma, nothing)
        return self.codec.decode(clean(x, output, alpha, sigma, self.target(alpha, sigma)))

    def sample_steps(
        self,
        condition: Condition,
        rng: Rng,
        *,
        solver: str = "dpmpp_2m",
        steps: int = 20,
        guidance: float = 1.0,
        grid: str | None = None,
        eta: float | None = None,
        variance: str | None = None,
    ) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) in [-1, 1] after each step; arguments as `sample`."""
        function, own_grid, _ = SOLVERS[_known("solver", solver, SOLVERS)]
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1")
        times = (GRIDS[_known("grid", grid, GRIDS)] if grid else own_grid)(self.schedule, steps)
        own = {"eta": eta, "variance": variance}
        own = {name: value for name, value in own.items() if value is not None}
        for name in own:
            if name not in inspect.signature(function).parameters:
                raise ValueError(f"solver {solver} has no option '{name}'; leave it out")
        denoise = self.denoiser(condition, guidance)
        _, sigma = self.schedule(times[:1])
        start = float(sigma) * rng.normal(*self.codec.shape)
        for x in function(denoise, start, times, self.schedule, rng, **own):
            yield self.codec.decode(x)

    def sample(
        self,
        condition: Condition,
        rng: Rng,
        *,
        solver: str = "dpmpp_2m",
        steps: int = 20,
        guidance: float = 1.0,
        grid: str | None = None,
        eta: float | None = None,
        variance: str | None = None,
    ) -> Tensor:
        """Draw images (B, C, H, W) in [-1, 1].

        Args:
            condition: what to draw; a label of None draws from all classes.
            rng: one stream per image.
            solver: ddpm, ddim, euler, heun or dpmpp_2m.
            steps: of the solver, from noise to picture.
            guidance: how far the condition is overdone; 1 is not at all.
            grid: where the steps lie: even_time, even_share, even_log_snr or karras; the solver's
                own if None.
            eta: ddim's share of fresh noise, 0 to 1.
            variance: ddpm's, small or large.

        Raises:
            ValueError: an unknown solver or grid, an option that the solver does not have, fewer
                than one step, or guidance of a model that cannot be guided.
        """
        drawing = self.sample_steps(
            condition,
            rng,
            solver=solver,
            steps=steps,
            guidance=guidance,
            grid=grid,
            eta=eta,
            variance=variance,
        )
        return deque(drawing, maxlen=1).pop()


def _like(value: Tensor, x: Tensor) -> Tensor:
    """Return (B,) values in x's type, with the dimensions of x."""
    return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _known(what: str, name: str, known: dict) -> str:
    if name not in known:
        raise ValueError(f"{what} '{name}' is not known; expected one of {', '.join(known)}")
    return name


def _stack(first: Embedded, second: Embedded) -> Embedded:
    """Return the embeddings of both batches as one batch."""
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in vars(first)}
    return Embedded(**{k: None if v[0] is None else torch.cat(v) for k, v in pairs.items()})
