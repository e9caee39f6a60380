"""Train any image generator on your own pictures; see its quality, coverage and speed.

    import trilemma
    trilemma.train("quick-diffusion", "photos/", budget=600, out="runs/photos")
    model = trilemma.load("runs/photos")
    images = model.sample(64, seed=0)
    scores = trilemma.evaluate(model, "photos/")

The functions are imported when they are first used, so that `import trilemma` is immediate.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilemma.comparison import compare
    from trilemma.evaluation import evaluate
    from trilemma.sampling import Trained, load
    from trilemma.training import train
    from trilemma.translation import translate

__version__ = "0.1.0"
__all__ = ["Trained", "compare", "evaluate", "load", "train", "translate"]

_HOMES = {
    "Trained": "sampling",
    "compare": "comparison",
    "evaluate": "evaluation",
    "load": "sampling",
    "train": "training",
    "translate": "translation",
}


def __getattr__(name: str) -> Any:
    """Import a public function on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"trilemma has no '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(f"trilemma.{_HOMES[name]}"), name)
