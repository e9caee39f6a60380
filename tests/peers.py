"""Published implementations to compare with, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

UNUSED = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "wcwidth")


def open_clip(module: str) -> ModuleType:
    """Return a module of open_clip, or skip.

    Without what the modules name and do not use here: torchvision, and a part of ftfy's.
    """
    if "open_clip" not in sys.modules:
        found = importlib.util.find_spec("open_clip")
        if found is None or found.origin is None:
            pytest.skip("open_clip is not installed")
        sys.modules["open_clip"] = ModuleType("open_clip")
        sys.modules["open_clip"].__path__ = [str(Path(found.origin).parent)]
    absent = [name for name in UNUSED if name not in sys.modules]
    for name in absent:
        stub = sys.modules[name] = ModuleType(name)
        stub.FrozenBatchNorm2d = nn.BatchNorm2d
        stub.wcwidth = stub.wcswidth = len
    try:
        return importlib.import_module(f"open_clip.{module}")
    except ImportError as error:
        pytest.skip(f"open_clip.{module} cannot be imported: {error}")
    finally:
        for name in absent:
            del sys.modules[name]
