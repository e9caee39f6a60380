"""What networks cost: counted exactly where it can be worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from trilemma import cli, recipe
from trilemma.batch import Batch, Condition, Rng
from trilemma.errors import UserError
from trilemma.model import Model, Phase
from trilemma.networks.dit import DiT
from trilemma.networks.layers import Embedded
from trilemma.profile import _step, flops, profile


class Two(Model):
    """A convolution and, twice, a linear layer of the features at each pixel."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)

    def phases(self):
        return [Phase("all", self.loss, [self.conv, self.linear])]

    def loss(self, batch):
        h = self.conv(batch.image).movedim(1, -1)
        return {"loss": self.linear(self.linear(h).sigmoid()).sum()}


def test_a_convolution_and_a_linear_layer_are_counted_exactly():
    image = torch.randn(4, 3, 6, 6)
    batch = Batch(image, Condition(4), 0, Rng(range(4)))
    (conv, linear), step = _step(Two(), batch)
    pixels = 36
    assert conv["flops"] == 2 * pixels * 3 * 8 * 9
    assert linear["flops"] == 2 * pixels * 8 * 8  # of one pass of two
    assert conv["parameters"] == 3 * 8 * 9 + 8
    assert conv["activations"] == 4 * pixels * 3  # its input
    assert linear["activations"] == 4 * pixels * 8  # its second input, which the sigmoid made
    assert step["activations"] == 4 * pixels * (3 + 8 + 8)
    # Backwards once more for the inputs, but for the picture, and once more for the weights.
    assert step["flops"] == 2 * conv["flops"] + 2 * 3 * linear["flops"]


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_takes_as_much_again_for_each_gradient(kind, groups):
    layer = kind(8, 16, 3, stride=2, groups=groups)
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    forwards = flops(lambda: layer(x))
    assert forwards == 2 * 2 * (81 if kind is nn.ConvTranspose2d else 16) * 9 * 8 * 16 / groups
    assert flops(lambda: layer(x).sum().backward()) == 3 * forwards


def test_attention_is_counted_on_a_cpu_too():
    network = DiT(4, 8, 32, width=64, depth=2, heads=2)
    x, time, vector = torch.randn(1, 4, 32, 32), torch.rand(1), torch.randn(1, 64)
    taken = flops(lambda: network(x, time, Embedded(vector=vector)))
    with torch.device("meta"):
        same = DiT(4, 8, 32, width=64, depth=2, heads=2)
        x, time, vector = (t.to("meta") for t in (x, time, vector))
        assert flops(lambda: same(x, time, Embedded(vector=vector))) == taken
    blocks = 2 * (12 * 64**2 * 256 + 2 * 256**2 * 64)
    assert taken / 2 == pytest.approx(blocks, rel=0.1)


def test_a_recipe():
    told = profile("quick-diffusion", 16)
    network = next(row for row in told["networks"] if row["name"] == "network")
    assert network["type"] == "QuickUNet"
    assert told["parameters"] == sum(row["parameters"] for row in told["networks"])
    assert told["step"]["flops"] == pytest.approx(3 * network["flops"], rel=0.02)
    assert 0.9 * told["step"]["activations"] < network["activations"] < told["step"]["activations"]


def test_every_network_of_a_gan_is_told():
    told = {row["name"]: row for row in profile("quick-gan", 16)["networks"]}
    assert {"generator", "critic"} <= told.keys()
    assert all(row["flops"] > 0 and row["activations"] > 0 for row in told.values())


def test_sizes_are_raised_to_what_a_network_can_take():
    assert profile("quick-diffusion", 14)["size"] == 16


def test_a_recipe_that_needs_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/vqvae"):
        profile("vq-transformer")
    assert recipe.load("vq-transformer")["about"]["needs"] == ["runs/vqvae"]


def test_the_command():
    call = CliRunner().invoke
    arguments = ["models", "quick-vae", "--profile", "--size", "16"]
    (told,) = json.loads(call(cli.app, [*arguments, "--json"]).stdout)
    assert told["recipe"] == "quick-vae" and told["networks"]
    result = call(cli.app, [*arguments, "vq-transformer"])
    assert "training step" in result.stdout
    assert "left out: vq-transformer" in result.stderr
