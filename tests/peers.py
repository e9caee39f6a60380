"""Published implementations to compare with, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

VISION = ("torchvision", "torchvision.ops", "torchvision.ops.misc")


def open_clip(module: str) -> ModuleType:
    """Return a module of open_clip, without torchvision, of which it names only a class; or skip.

    Its package imports more of torchvision, so its modules are imported without it.
    """
    if "open_clip" not in sys.modules:
        found = importlib.util.find_spec("open_clip")
        if found is None or found.origin is None:
            pytest.skip("open_clip is not installed")
        sys.modules["open_clip"] = ModuleType("open_clip")
        sys.modules["open_clip"].__path__ = [str(Path(found.origin).parent)]
    absent = [name for name in VISION if name not in sys.modules]
    for name in absent:
        sys.modules[name] = ModuleType(name)
    sys.modules[VISION[-1]].FrozenBatchNorm2d = nn.BatchNorm2d
    try:
        return importlib.import_module(f"open_clip.{module}")
    except ImportError as error:
        pytest.skip(f"open_clip.{module} cannot be imported: {error}")
    finally:
        for name in absent:
            del sys.modules[name]
