"""Recipes: reading, changing, filling in, building."""

import pytest

from trilemma import recipe
from trilemma.errors import UserError

UNET = {"type": "networks.unet.UNet", "in_channels": 3, "out_channels": 3, "size": 16}


def test_packaged_recipes_load():
    assert {"ae", "vae", "dcgan", "wgan-gp", "ddpm", "flow-matching"} <= set(recipe.names())
    for name in recipe.names():
        assert "type" in recipe.load(name)["model"]


def test_unknown_recipe_suggests():
    with pytest.raises(UserError, match="did you mean 'ddpm'"):
        recipe.load("dppm")


def test_a_recipe_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[model]\ntype = "models.x.Y"\n')
    assert recipe.load(path)["model"]["type"] == "models.x.Y"
    path.write_text("[model\n")
    with pytest.raises(UserError, match="not valid TOML"):
        recipe.load(path)
    path.write_text("[train]\n")
    with pytest.raises(UserError, match="names no model"):
        recipe.load(path)


def test_override():
    spec = {"model": {"type": "x", "network": {"width": 1}}, "train": {"batch": 8}}
    changed = recipe.override(spec, ["train.batch=64", "model.network.width=[1, 2]", "sample.a=b"])
    assert changed["train"]["batch"] == 64 and changed["model"]["network"]["width"] == [1, 2]
    assert changed["sample"]["a"] == "b" and spec["train"]["batch"] == 8
    for wrong, told in [
        ("batch=3", "section.key=value"),
        ("train.batch", "section.key=value"),
        ("model.network=3", "is a table with width"),
        ("train.batch.size=3", "is a value"),
    ]:
        with pytest.raises(UserError, match=told):
            recipe.override(spec, [wrong])


def test_resolve_fills_in_facts():
    spec = {"model": {"shape": "@shape", "list": [{"n": "@classes"}]}}
    filled = recipe.resolve(spec, {"shape": [1, 8, 8], "classes": 4})
    assert filled == {"model": {"shape": [1, 8, 8], "list": [{"n": 4}]}}
    with pytest.raises(UserError, match="asks for @depth"):
        recipe.resolve({"a": "@depth"}, {"shape": 1})


def test_facts_are_added_and_multiplied():
    facts = {"shape": [3, 8, 8], "channels": 3, "size": 8}
    for asked, value in (
        ("@channels * 2", 6),
        ("@channels*2+1", 7),
        ("@channels + @size * 2", 19),
        ("@channels * @size", 24),
        ("@channels + 1", 4),
    ):
        assert recipe.resolve({"a": asked}, facts) == {"a": value}
    with pytest.raises(UserError, match="asks for two; the data tell shape, channels, size"):
        recipe.resolve({"a": "@channels * two"}, facts)
    with pytest.raises(UserError, match="asks for @shape . 2; only numbers can be added and mul"):
        recipe.resolve({"a": "@shape * 2"}, facts)


def test_a_run_that_is_not_there_is_told_with_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = (
        r"runs/kl-f4 is not there.*\(trilemma train kl-f4 --data ...\).*"
        r"--set model.codec.stage.path=RUN"
    )
    with pytest.raises(UserError, match=told):
        recipe.resolve(recipe.load("latent-diffusion"), {"shape": [3, 16, 16]})


def test_only_classes_of_this_package_are_built():
    for path in ("os.system", "networks.layers.sinusoidal", "networks.nothing.UNet", "train.Run"):
        with pytest.raises(UserError, match="type"):
            recipe.build({"type": path})
    with pytest.raises(UserError, match="networks.unet has .*UNet"):
        recipe.build({"type": "networks.unet.Tensor"})


def test_a_wrong_argument_names_the_accepted():
    with pytest.raises(UserError, match="no option 'chanels' .did you mean 'channels'.*it has"):
        recipe.build({**UNET, "chanels": 3})
    with pytest.raises(UserError, match="needs the option"):
        recipe.build({"type": "networks.unet.UNet"})


def test_find():
    assert recipe.find({"a": [{"b": {"classes": 3}}]}, "classes") == 3
    assert recipe.find({"a": 1}, "classes") is None
