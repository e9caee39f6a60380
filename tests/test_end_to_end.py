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


@pytest.mark.parametrize("folders", [1, 2])
def test_a_recipe_guides_by_class_where_there_are_any(tmp_path, folders):
    root = tmp_path / "pictures"
    for i in range(folders):
        tiny.pictures(root / f"class{i}" if folders > 1 else root, count=12)
    changes = tiny.overrides("quick-diffusion")
    trained = trilemma.train(
        "quick-diffusion", root, out=tmp_path / "run", steps=1, overrides=changes, quiet=True
    )
    assert trained.recipe["sample"]["guidance"] == 1.5
    assert trained.options({}).get("guidance") == (1.5 if folders > 1 else None)
    trained.sample(2, steps=2)
    if folders == 1:
        with pytest.raises(ValueError, match="guidance 2.0 needs a model trained with labels"):
            trained.sample(2, steps=2, guidance=2.0)
