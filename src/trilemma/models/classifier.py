"""A classifier of noisy pictures, for a diffusion model to be guided by.

    loss = E_t,noise [ - log p(y | x_t) ],    x_t = alpha(t) x_0 + sigma(t) noise

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", section 4; Song et al.
2021, "Score-Based Generative Modeling through Stochastic Differential Equations", section 5. How
its gradient guides is derived in `diffusion.guidance`. It need not know the schedule of the model
it guides: with equal signal-to-noise ratio, x_t of one schedule is that of another, scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.codecs import Pixels
from trilemma.diffusion.guidance import elsewhere
from trilemma.diffusion.schedules import Linear, Schedule
from trilemma.diffusion.times import Uniform
from trilemma.model import Losses, Model, Phase


class Classifier(Model):
    """A network that tells the class of pictures under noise of any strength.

    Args:
        codec: the space it works in, that of the model to be guided.
        network: `(x (B, C, H, W), time (B,)) -> logits (B, classes)`.
        classes: of the data; there must be at least two.
        schedule: (alpha, sigma) over time; Linear if None.
        times: which times training visits; Uniform if None.
        data_std: standard deviation of x_0; the network's input is scaled to unit variance.
    """

    def __init__(
        self,
        codec: Pixels,
        network: nn.Module,
        classes: int,
        schedule: Schedule | None = None,
        times: Callable[[Rng, Schedule], Tensor] | None = None,
        data_std: float = 1.0,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(
                f"the data have {classes} classes, and a classifier tells two or more apart; "
                "expected a folder with a folder for each class, or a named set with labels"
            )
        self.codec, self.network, self.classes = codec, network, classes
        self.schedule, self.times = schedule or Linear(), times or Uniform()
        self.data_std = data_std

    def phases(self) -> list[Phase]:
        """One phase."""
        return [Phase("classify", self.loss, [self.network])]

    def loss(self, batch: Batch) -> Losses:
        """Tell the classes at random times; logs the share that is told correctly."""
        label = batch.condition.label
        assert label is not None
        x0 = self.codec.encode(batch.image)
        t = self.times(batch.rng, self.schedule)  # (B,)
        noise = batch.rng.normal(*x0.shape[1:])
        alpha, sigma = (v[:, None, None, None] for v in self.schedule(t))
        logits = self.logits(alpha * x0 + sigma * noise, t)
        correct = (logits.argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "correct": correct}

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        """Return (B, classes) float logits of x_t (B, C, H, W) at times t (B,)."""
        alpha, sigma = (v[:, None, None, None] for v in self.schedule(t))
        scale = (alpha**2 * self.data_std**2 + sigma**2).rsqrt()
        return self.network(scale * x, t).float()

    def log_prob_of(
        self, condition: Condition, shape: Sequence[int], schedule: Schedule
    ) -> Callable[[Tensor, float], Tensor]:
        """Return (x_t (B, C, H, W), t) -> log p(label | x_t) (B,) in another model's schedule.

        Args:
            condition: the labels.
            shape: (C, H, W) of the other model's x_t.
            schedule: the other model's.

        Raises:
            ValueError: there are no labels or unknown ones, or the shape is another.
        """
        label = condition.label
        if label is None or not (0 <= int(label.min()) <= int(label.max()) < self.classes):
            told = "none" if label is None else f"{int(label.min())} to {int(label.max())}"
            raise ValueError(
                f"guidance by a classifier needs labels of 0 to {self.classes - 1}; got {told}"
            )
        if tuple(shape) != self.codec.shape:
            raise ValueError(
                f"the classifier knows pictures of {self.codec.shape} and the model draws "
                f"{tuple(shape)}; train one at this size"
            )

        def log_prob(x: Tensor, t: float) -> Tensor:
            x, t = elsewhere(x, t, schedule, self.schedule)
            time = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
            return self.logits(x, time).log_softmax(1).gather(1, label[:, None])[:, 0]

        return log_prob
