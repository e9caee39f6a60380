"""What diffusers draws from an exported model is what the model draws."""

import json

import pytest
import torch

from trilemma import recipe, sampling
from trilemma.batch import Condition, Rng
from trilemma.errors import UserError
from trilemma.export import _later, to_diffusers
from trilemma.networks.layers import sinusoidal

SPEC = {
    "type": "models.diffusion.Diffusion",
    "codec": {"type": "codecs.Pixels", "shape": [3, 16, 16]},
    "schedule": {"type": "diffusion.schedules.Linear"},
    "network": {
        "type": "networks.unet.UNet",
        "in_channels": 3,
        "out_channels": 3,
        "channels": 128,
        "multipliers": [1, 1],
        "blocks": 1,
        "size": 16,
        "attention": [8],
    },
}


def trained(**changes):
    torch.manual_seed(0)
    spec = {**SPEC, **{k: v for k, v in changes.items() if k != "network"}}
    spec["network"] = {**SPEC["network"], **changes.get("network", {})}
    model = recipe.build(spec).eval().requires_grad_(False)
    for parameter in model.network.parameters():  # what begins at zero too
        parameter.add_(0.02 * torch.randn_like(parameter))
    facts = {"shape": [3, 16, 16], "label_names": [], "attribute_names": []}
    return sampling.Trained(model, {"model": spec, "run": {"recipe": "ddpm"}}, facts, {})


def test_later():
    weight, k = torch.randn(5, 8, dtype=torch.float64), torch.tensor([0.0, 3.0, 700.0])
    later = sinusoidal(k + 1, 8).double() @ weight.T
    torch.testing.assert_close(
        sinusoidal(k, 8).double() @ _later(weight, 8).T, later, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schedule": {"type": "diffusion.schedules.Straight"}, "target": "straight"}, "Straight"),
        ({"network": {"channels": 32}}, r"\[8, 16\] groups"),
        ({"network": {"resample": "biggan"}}, "resamples in blocks"),
        ({"network": {"multipliers": [1, 1, 1, 1, 1, 1]}}, "cannot halve 16x16"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, told):
    with pytest.raises(UserError, match=f"ddpm cannot be exported .*{told}"):
        to_diffusers(trained(**changes), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target": "velocity", "schedule": {"type": "diffusion.schedules.Cosine"}},
        {"network": {"norm": "scale-shift", "head_channels": 64, "multipliers": [1, 2]}},
    ],
)
def test_diffusers_draws_the_same(tmp_path, monkeypatch, changes):
    diffusers = pytest.importorskip("diffusers")
    ours = trained(**changes)
    to_diffusers(ours, tmp_path / "out")
    with torch.inference_mode():
        images = ours.model.sample(
            Condition(2), Rng([3, 4]), solver="ddpm", steps=4, grid="trailing"
        )
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    rng = Rng([3, 4])
    monkeypatch.setattr(torch, "randn", lambda shape, **_: rng.normal(*shape[1:]))
    theirs = pipe(batch_size=2, num_inference_steps=4, output_type="np").images
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1
    assert (images - theirs).abs().max() < 1e-4


@pytest.mark.slow
def test_labels_are_exported(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = trained(conditioner={"type": "conditioning.Labels", "classes": 3, "dim": 512})
    to_diffusers(ours, tmp_path / "out")
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["num_class_embeds"] == 4
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    x, label, model = torch.randn(2, 3, 16, 16), torch.tensor([0, 2]), ours.model
    with torch.inference_mode():
        embedded = model.conditioner(Condition(2, label))
        own = model.network(x, torch.full((2,), 0.4), embedded)
        assert (own - unet(x, 399, label).sample).abs().max() < 1e-4
