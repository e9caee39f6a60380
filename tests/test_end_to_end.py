"""The README's words, from Python."""

import pytest
import torch

import tiny
import trilemma


def test_five_lines_of_python(tmp_path):
    folder = tiny.pictures(tmp_path / "pictures", count=60)
    trilemma.train(
        "ddpm", folder, out=tmp_path / "run", steps=2, overrides=tiny.overrides("ddpm"), quiet=True
    )
    model = trilemma.load(tmp_path / "run")
    images = model.sample(4, seed=1, steps=2)
    assert images.shape == (4, 3, tiny.SIZE, tiny.SIZE) and images.dtype == torch.uint8
    scores = trilemma.evaluate(model, folder, n=6, split="train", steps=2, features="pixels")
    assert "protocol" in scores


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="nothing"):
        _ = trilemma.nothing
