"""The contract between a family of generators and the rest: Model, Phase, and small protocols.

A Model owns its networks, its losses and its way to sample. It knows nothing of optimizers, files
or devices. A Phase is one player's turn in training: a loss, and the modules that learn in it. A
VAE has one phase, a GAN two, and the training loop treats them alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng

Losses = dict[str, Tensor]
"""`"loss"` (a scalar, mean over the batch) is differentiated; the rest is logged."""


@dataclass(frozen=True)
class Phase:
    """One player's turn.

    Attributes:
        name: names the phase in logs, and in a recipe's `[train.phases.NAME]`.
        loss: the objective on a batch, a mean over its images.
        modules: these learn in this phase, all others hold still.
        every: taken at every n-th step.
        start: first taken when so many training images have been seen.
        after: called after the optimizer has moved (WGAN's weight clipping, a codebook's update).
    """

    name: str
    loss: Callable[[Batch], Losses]
    modules: Sequence[nn.Module]
    every: int = 1
    start: int = 0
    after: Callable[[], None] | None = None


class Model(nn.Module, ABC):
    """A family of generators: its networks, its losses, its way to sample.

    Attributes:
        training_only: arguments, and the modules of that name, that nothing but training needs: a
            teacher. A run's state has them, the model that is shared has not.
        any_size: it learns from pictures of any sides that its networks can halve or divide.
    """

    training_only: Sequence[str] = ()
    any_size: bool = False

    @abstractmethod
    def phases(self) -> list[Phase]:
        """Return the phases of one training step, in order."""


@runtime_checkable
class Generator(Protocol):
    """Draws images."""

    def sample(self, condition: Condition, rng: Rng, **options: Any) -> Tensor:
        """Draw (B, C, H, W) images in [-1, 1] as `condition` says, one stream of `rng` each."""
        ...


@runtime_checkable
class HasOwnOptions(Protocol):
    """Takes sampling options that depend on others, such as those of a solver."""

    def own_options(self, chosen: Mapping[str, Any]) -> list[str]:
        """Return the names of what `sample` takes beside its own options, with those chosen."""
        ...


@runtime_checkable
class HasLikelihood(Protocol):
    """Knows how probable an image is.

    Attributes:
        discrete: `log_prob` is the log probability of the 8-bit picture; else it is the log density
            on [-1, 1] of the picture dequantised (`batch.dequantise`).
        bound: `log_prob` bounds it from below; else it is exact.
    """

    discrete: bool
    bound: bool

    def log_prob(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Return (B,) nats of images (B, C, H, W), of a model with classes given labels (B,).

        Without labels over equally frequent classes, which may take a pass for each of them.
        """
        ...


@runtime_checkable
class HasCostlyLikelihood(HasLikelihood, Protocol):
    """Takes so many network calls to tell a likelihood that it is only told when asked for.

    Attributes:
        likelihood_calls: how many.
    """

    likelihood_calls: int


@runtime_checkable
class HasLatents(Protocol):
    """Maps images to latents and back: interpolation and arithmetic, alike in every family."""

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to latents."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents to images (B, C, H, W) in [-1, 1]."""
        ...


@runtime_checkable
class HasCompletion(Protocol):
    """Draws the rest of a picture of which a part is given."""

    def complete(
        self, image: Tensor, known_rows: int, condition: Condition, rng: Rng, **options: Any
    ) -> Tensor:
        """Keep the first rows of images (B, C, H, W) in [-1, 1] as they are and draw the rest.

        What is below them in `image` is not read. Without a label, a model that knows classes draws
        one for each image, as the known rows tell.
        """
        ...


@runtime_checkable
class HasDenoising(Protocol):
    """Knows what pictures lie behind noise of any strength."""

    def restore(self, image: Tensor, deviation: Tensor) -> Tensor:
        """Take Gaussian noise of deviations (B,) from images (B, C, H, W); into [-1, 1]."""
        ...


@runtime_checkable
class HasRedrawing(Protocol):
    """Draws pictures anew: wholly, but alike, or in a part only."""

    def vary(
        self, image: Tensor, strength: float, condition: Condition, rng: Rng, **options: Any
    ) -> Tensor:
        """Draw pictures like images (B, C, H, W) in [-1, 1]; strength 0 to 1, 1 not alike at all.

        Options as `sample`.
        """
        ...

    def inpaint(
        self, image: Tensor, mask: Tensor, condition: Condition, rng: Rng, **options: Any
    ) -> Tensor:
        """Draw images (B, C, H, W) in [-1, 1] anew where mask (B, 1, H, W) is 1.

        What is there in `image` is not read; the rest is kept as it is.
        """
        ...


@runtime_checkable
class TellsClasses(Protocol):
    """Tells the class of noisy pictures, by which others are guided; draws nothing."""

    def log_prob_of(
        self, condition: Condition, shape: Sequence[int], schedule: Any
    ) -> Callable[[Tensor, float], Tensor]:
        """Return (x_t (B, *shape), t) -> log p(label | x_t) (B,) in another model's schedule."""
        ...


@runtime_checkable
class Matches(Protocol):
    """Puts pictures and texts into one space, where those that belong together are near.

    Draws nothing. Vectors are of unit length, so that their products are cosines.
    """

    def embed_images(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to unit vectors (B, D)."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Map B texts to unit vectors (B, D)."""
        ...


@runtime_checkable
class Reads(Matches, Protocol):
    """Tells what it sees in each word of a text, too.

    Attributes:
        dim: D, of the vectors.
        words: (T, W): how many tokens a text has at most, and the width of their features.
    """

    dim: int
    words: tuple[int, int]

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Map B texts to features of their tokens (B, T, W), a mask, and unit vectors (B, D).

        The mask (B, T) is true where there is a token.
        """
        ...


@runtime_checkable
class DrawsEmbeddings(Protocol):
    """Draws the embedding that `Matches` has of a picture, for words; no pictures."""

    def draw(self, condition: Condition, rng: Rng, **options: Any) -> Tensor:
        """Draw unit vectors (B, D) for the texts of a condition, one stream of `rng` each."""
        ...


@runtime_checkable
class Begins(Protocol):
    """A model that has something to do before training begins, when its frozen parts are there."""

    def begin(self) -> bool:
        """Take weights from a frozen part; return whether nothing is left to be measured."""
        ...


@runtime_checkable
class HasPositions(Protocol):
    """Learns a vector for each place of a picture, which another size has others of.

    Attributes:
        positions: name of a weight (rows x columns x depth, width) -> (rows, columns, depth).
    """

    positions: Mapping[str, tuple[int, int, int]]


@runtime_checkable
class Measures(Protocol):
    """A part of a model that takes a measure of the data, once, before training begins."""

    def measure(self, images: Iterable[Tensor]) -> None:
        """Look at batches of images (B, C, H, W) in [-1, 1]."""
        ...


@runtime_checkable
class Keeps(Protocol):
    """A codec that no training changes: what it makes of a picture can be computed once.

    `recall(keep(image))` is `encode(image)`, to the rounding of what is kept.
    """

    def keep(self, image: Tensor) -> Tensor:
        """Return what is kept of images (B, C, H, W) in [-1, 1]: (B, ...), in few bytes."""
        ...

    def recall(self, kept: Tensor) -> Tensor:
        """Return what `encode` makes of the images of which this was kept."""
        ...


class Frozen(nn.Module):
    """Holds a trained module that another model uses but never trains.

    Its parameters take no gradient and it stays in evaluation mode.

    Args:
        module: to hold.
        path: the run that trained it, whose weights it begins with: `training.load_frozen`.
    """

    def __init__(self, module: nn.Module, path: str | None = None) -> None:
        super().__init__()
        self.module, self.path = module.requires_grad_(False).eval(), path

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode whatever `mode` says."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the held module."""
        return self.module(*args, **kwargs)


def matching(clip: Frozen) -> Reads:
    """Return what a frozen part holds as a model of pictures and texts.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(clip.module, Reads):
        raise ValueError(
            f"the model of pictures and words is a trained {type(clip.module).__name__}; give the "
            "run of a CLIP"
        )
    return clip.module
