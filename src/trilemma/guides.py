"""Guides: functions of pictures by which `sample --guide module:function` guides a diffusion model.

A guide maps the clean pictures that the model expects, (B, C, H, W) in [-1, 1], to a number for
each, (B,), that is greater the more a picture is as it shall be. It must be differentiable. Any
function of any module serves: these are examples to use and to read.

    trilemma sample RUN --guide trilemma.guides:symmetry --guide-scale 10 --out DIR
    trilemma sample RUN --guide mine:darker --guide-scale 5 --out DIR        # darker in ./mine.py

The scale is that of a log probability: minus a squared error in units of one's tolerance is a good
choice. What is named on the command line is run; what a checkpoint says never is.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from trilemma.diffusion.guidance import Guide
from trilemma.errors import UserError


def symmetry(image: Tensor) -> Tensor:
    """Be alike left and right: minus the squared difference from the mirror image, summed."""
    return -(image - image.flip(-1)).square().flatten(1).sum(1) / 4


def bright(image: Tensor) -> Tensor:
    """Be bright: the mean of all pixels, times their number."""
    return image.flatten(1).sum(1)


def dark(image: Tensor) -> Tensor:
    """Be dark."""
    return -bright(image)


def red(image: Tensor) -> Tensor:
    """Be red on the whole: minus the squared distance of the mean colour from pure red."""
    return colour(image, (1.0, -1.0, -1.0))


def green(image: Tensor) -> Tensor:
    """Be green on the whole."""
    return colour(image, (-1.0, 1.0, -1.0))


def blue(image: Tensor) -> Tensor:
    """Be blue on the whole."""
    return colour(image, (-1.0, -1.0, 1.0))


def colour(image: Tensor, wanted: tuple[float, ...]) -> Tensor:
    """Be of a mean colour: minus the squared distance from it, times the number of pixels.

    Raises:
        UserError: the pictures have another number of channels.
    """
    if image.shape[1] != len(wanted):
        raise UserError(
            f"a colour of {len(wanted)} channels was asked of pictures of {image.shape[1]}; "
            "grey pictures can be told to be bright or dark"
        )
    distance = (image.mean((2, 3)) - image.new_tensor(wanted)).square().sum(1)
    return -distance * image[0, 0].numel()


def find(name: str) -> Guide:
    """Return the function that `module:function` names; modules of the working folder count.

    Raises:
        UserError: the name is not of that form, or there is no such module or function.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(
            f"guide '{name}': expected module:function, such as trilemma.guides:symmetry, or "
            "mine:darker for the function `darker` in mine.py of this folder"
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # of the user's module, whatever it is
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"guide '{name}': the module cannot be imported ({what})") from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UserError(
            f"guide '{name}': {module_name} has no function '{function_name}'; "
            f"it has {', '.join(there) or 'none'}"
        )
    return function


def name_of(guide: Any) -> str:
    """Return `module:function` of a function, as it is written into pictures."""
    return f"{guide.__module__}:{getattr(guide, '__qualname__', type(guide).__name__)}"
