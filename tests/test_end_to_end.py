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


@pytest.mark.parametrize("classes", [0, 2])
def test_a_recipe_guides_by_class_where_there_are_any(tmp_path, classes):
    root = tiny.pictures(tmp_path / "pictures", count=24, classes=2)
    if not classes:
        for picture in root.glob("*/*.png"):
            picture.rename(root / picture.name)
    changes = tiny.overrides("quick-diffusion")
    trained = trilemma.train(
        "quick-diffusion", root, out=tmp_path / "run", steps=1, overrides=changes, quiet=True
    )
    assert trained.recipe["sample"]["guidance"] == 1.5
    assert trained.options({}).get("guidance") == (1.5 if classes else None)
    trained.sample(2, steps=2)
    if not classes:
        with pytest.raises(ValueError, match="guidance 2.0 needs a model trained with labels"):
            trained.sample(2, steps=2, guidance=2.0)
