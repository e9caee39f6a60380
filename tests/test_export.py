"""What diffusers draws from an exported model is what the model draws."""

import itertools
import json

import pytest
import torch

from trilemma import recipe, sampling
from trilemma.batch import Batch, Condition, Rng
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


STRAIGHT = {
    "schedule": {"type": "diffusion.schedules.Straight"},
    "target": "straight",
    "scale_input": False,
}
STAGE = {"shape": [3, 16, 16], "channels": [16, 32], "groups": 8, "attention": True}
LATENTS = {
    "type": "codecs.Latents",
    "shape": [3, 16, 16],
    "stage": {
        "type": "model.Frozen",
        "module": {
            "type": "models.first_stage.AutoencoderKL",
            "encoder": {"type": "networks.kl_autoencoder.StageEncoder", "latent": 8, **STAGE},
            "decoder": {"type": "networks.kl_autoencoder.StageDecoder", "latent": 4, **STAGE},
            "critic": {
                "type": "networks.patchgan.Critic",
                "shape": [3, 16, 16],
                "channels": 8,
                "depth": 1,
            },
            "weights": "none",
        },
    },
}
DIT = {
    "type": "networks.dit.DiT",
    "in_channels": 4,
    "out_channels": 4,
    "size": 8,
    "patch": 2,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "inclusive": True,
}
LABELS = {"type": "conditioning.Labels", "classes": 3, "dim": 32}


def trained(**changes):
    torch.manual_seed(0)
    spec = {**SPEC, **{k: v for k, v in changes.items() if k != "network"}}
    base = {} if "type" in changes.get("network", {}) else SPEC["network"]
    spec["network"] = {**base, **changes.get("network", {})}
    model = recipe.build(spec).eval().requires_grad_(False)
    for parameter in model.network.parameters():  # what begins at zero too
        parameter.add_(0.02 * torch.randn_like(parameter))
    if spec["codec"]["type"] == "codecs.Latents":
        model.codec.mean.copy_(torch.randn(4, 1, 1))
        model.codec.deviation.fill_(1.7)
    facts = {"shape": [3, 16, 16], "label_names": list("abc"), "attribute_names": []}
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
        ({**STRAIGHT, "scale_input": True}, "model.scale_input=false"),
        ({**STRAIGHT, "target": "velocity"}, "predicts the velocity"),
        ({"schedule": {"type": "diffusion.schedules.Cosine", "steps": 500}}, "500 steps"),
        ({"schedule": {"type": "diffusion.schedules.VariancePreserving"}}, "not one of betas"),
        ({"network": {"channels": 32}}, r"\[8, 16\] groups"),
        ({"network": {"resample": "biggan"}}, "resamples in blocks"),
        ({"codec": LATENTS, **STRAIGHT, "network": DIT}, "no pipeline of diffusers draws latents"),
        (
            {"network": {**DIT, "in_channels": 3, "out_channels": 3}},
            "with a DiT diffusers draws latents",
        ),
        ({"codec": LATENTS, "network": {**DIT, "inclusive": False}}, "inclusive=true"),
        ({"codec": LATENTS, "network": {**DIT, "conditioning": "adaln"}}, "not adaln-zero"),
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
    noise = itertools.chain([rng.normal(3, 16, 16)], rng.normals(4, 3, 16, 16))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(noise))
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


@pytest.mark.slow
def test_straight_paths_are_drawn_the_same(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    ours = trained(**STRAIGHT)
    to_diffusers(ours, tmp_path / "out")
    ours.model.codec.bounds = None  # theirs clips no prediction
    grid = [*torch.linspace(1, 0.001, 4).tolist(), 0]
    with torch.inference_mode():
        images = ours.model.sample(Condition(2), Rng([3, 4]), solver="euler", steps=4, grid=grid)
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    theirs = drawn(pipe, monkeypatch, batch_size=2)
    assert (images - theirs).abs().max() < 1e-4


def drawn(pipe, monkeypatch, **told):
    pipe.set_progress_bar_config(disable=True)
    rng = Rng([3, 4])
    monkeypatch.setattr(torch, "randn", lambda shape, **_: rng.normal(*shape[1:]))
    made = pipe(num_inference_steps=4, output_type="np", **told).images
    return torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["noise", "velocity"])
def test_latents_are_drawn_the_same(tmp_path, monkeypatch, target):
    diffusers = pytest.importorskip("diffusers")
    network = {"in_channels": 4, "out_channels": 4, "size": 8, "attention": [4]}
    ours = trained(codec=LATENTS, target=target, network=network)
    to_diffusers(ours, tmp_path / "out")
    with torch.inference_mode():
        images = ours.model.sample(
            Condition(2), Rng([3, 4]), solver="ddim", steps=4, grid="trailing"
        )
    pipe = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    theirs = drawn(pipe, monkeypatch, batch_size=2)
    assert images.std() > 0.1 and (images - theirs).abs().max() < 1e-4
    with torch.inference_mode():  # the way in is the same too
        told = pipe.vqvae.encode(images).latent_dist
        mean, log_variance = ours.model.codec.stage.module._posterior(images)
        own = ours.model.codec.encode(images)
        torch.testing.assert_close(
            told.mode() * pipe.vqvae.config.scaling_factor, own, atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(told.logvar, log_variance, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_transformer_draws_latents_the_same(tmp_path, monkeypatch, guidance):
    diffusers = pytest.importorskip("diffusers")
    ours = trained(codec=LATENTS, network=DIT, conditioner=LABELS)
    to_diffusers(ours, tmp_path / "out")
    label = torch.tensor([0, 2])
    with torch.inference_mode():
        images = ours.model.sample(
            Condition(2, label), Rng([3, 4]), solver="ddim", steps=4, grid="trailing",
            guidance=guidance,
        )  # fmt: skip
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    labels = pipe.get_label_ids(["a", "c"])
    theirs = drawn(pipe, monkeypatch, class_labels=labels, guidance_scale=guidance)
    assert images.std() > 0.1 and (images - theirs).abs().max() < 1e-4
    assert not torch.allclose(images[0], images[1])


def test_a_first_stage_of_that_layout_learns():
    torch.manual_seed(0)
    model = recipe.build(LATENTS["stage"]["module"])
    assert model.latent_shape == (4, 8, 8)
    rng = Rng(range(2))
    losses = model.loss(Batch(rng.uniform(3, 16, 16) * 2 - 1, Condition(2), 0, rng))
    losses["loss"].backward()
    assert all(p.grad is not None for part in (model.encoder, model.decoder)
               for p in part.parameters())  # fmt: skip
    with pytest.raises(UserError, match="do not divide by 2"):
        odd = {**LATENTS["stage"]["module"]["encoder"], "shape": [3, 17, 16]}
        recipe.build(odd)
