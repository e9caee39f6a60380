"""Published implementations to compare with, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def open_clip(module: str) -> ModuleType:
    """Return a module of open_clip, without what its package imports (torchvision); or skip."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        pytest.skip("open_clip is not installed")
    if "open_clip" not in sys.modules:
        package = ModuleType("open_clip")
        package.__path__ = [str(Path(found.origin).parent)]
        sys.modules["open_clip"] = package
    try:
        return importlib.import_module(f"open_clip.{module}")
    except ImportError as error:
        pytest.skip(f"open_clip.{module} cannot be imported: {error}")
