"""Stable Diffusion 3 and FLUX.1 from texts on, against diffusers' pipelines."""

import json

import pytest
import torch

from rectified import flux_pipeline, sd3_pipeline
from trilemma.batch import Rng
from trilemma.diffusion.solvers import SOLVERS
from trilemma.errors import UserError
from trilemma.networks.flux import Flux
from trilemma.networks.kl_autoencoder import KLAutoencoder
from trilemma.networks.mmdit import MMDiT
from trilemma.stable import configs, flow, flux, places, sd3, t5
from trilemma.stable.rectified import SCHEDULE, Flux1, StableDiffusion3
from trilemma.stable.t5 import Encoder

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TEXTS = ["a red apple", "two green pears, and a dish that no one will ever eat from again"]
AGAINST = "blue"
SHIFTS = {
    "static": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
}


def loaded(network, rules, module):
    state = module.state_dict()
    where = places.find(network.state_dict(), rules)
    network.load_state_dict({name: place.take(state[place.name]) for name, place in where.items()})
    return network.eval()


def shift_of(scheduler):
    return flow.from_config(json.loads(scheduler.to_json_string()), "scheduler_config.json")


def ours(pipeline):
    """Our model of diffusers' pipeline."""
    shift = shift_of(pipeline.scheduler)
    clip = Encoder(pipeline.tokenizer, pipeline.text_encoder)
    module = pipeline.transformer
    if hasattr(pipeline, "tokenizer_3"):
        config = sd3.from_config(module.config, "config.json")
        network = loaded(MMDiT(**config), sd3.diffusers_rules(config), module)
        clips = clip, Encoder(pipeline.tokenizer_2, pipeline.text_encoder_2)
        words = Encoder(pipeline.tokenizer_3, pipeline.text_encoder_3)
        words = words if pipeline.tokenizer_3 else None
        return StableDiffusion3(network, vae(pipeline), shift, clips, words)
    config = flux.from_config(module.config, "config.json")
    network = loaded(Flux(**config), flux.diffusers_rules(), module)
    words = Encoder(pipeline.tokenizer_2, pipeline.text_encoder_2)
    return Flux1(network, vae(pipeline), shift, clip, words)


def vae(pipeline):
    told = configs.autoencoder(pipeline.vae.config, "config.json")
    network = KLAutoencoder(**told)
    network.load_state_dict(pipeline.vae.state_dict(), strict=False)
    return network.eval()


def draw(model, x, steps, negative=None, solver="euler", **guidance):
    denoise = model.denoiser(TEXTS, negative, **guidance)
    times = model.times(steps, *x.shape[-2:])
    *_, last = SOLVERS[solver].steps(denoise, x, times, SCHEDULE, Rng([1, 2]))
    return last


def noise(height=8, width=12):
    return torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(2))


def assert_close(ours, theirs):
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_t5", [True, False], ids=["t5", "no t5"])
@pytest.mark.parametrize("medium35", [False, True], ids=["3", "3.5"])
@torch.no_grad()
def test_sd3_draws_what_diffusers_draws(with_t5, medium35):
    pipeline = sd3_pipeline(with_t5, medium35)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        TEXTS,
        negative_prompt=[AGAINST] * 2,
        latents=noise(),
        height=16,
        width=24,
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="latent",
    ).images
    assert_close(draw(ours(pipeline), noise(), 4, AGAINST, guidance=5.0), expected)


@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("true", [1.0, 3.0])
@torch.no_grad()
def test_flux_draws_what_diffusers_draws(guided, true):
    pipeline = flux_pipeline(guided)
    pipeline.set_progress_bar_config(disable=True)
    packed = pipeline._pack_latents(noise(), 2, 16, 8, 12)
    expected = pipeline(
        TEXTS,
        negative_prompt=[AGAINST] * 2,
        true_cfg_scale=true,
        latents=packed,
        height=16,
        width=24,
        num_inference_steps=4,
        guidance_scale=2.5,
        output_type="latent",
    ).images
    expected = pipeline._unpack_latents(expected, 16, 24, 2)
    told = {"guidance": 2.5} if guided else {}
    against = AGAINST if true > 1 else None
    assert_close(draw(ours(pipeline), noise(), 4, against, true_guidance=true, **told), expected)


@torch.no_grad()
def test_texts_are_read_as_diffusers_reads_them():
    pipeline = sd3_pipeline()
    words, _, vector, _ = pipeline.encode_prompt(TEXTS, TEXTS, TEXTS)
    told = ours(pipeline).embed(TEXTS)
    assert told.tokens.shape == (2, 16 + 256, 40)
    assert_close(told.tokens, words)
    assert_close(told.vector, vector)
    pipeline = flux_pipeline()
    words, vector, _ = pipeline.encode_prompt(TEXTS)
    told = ours(pipeline).embed(TEXTS)
    assert told.tokens.shape == (2, 512, 40)
    assert_close(told.tokens, words)
    assert_close(told.vector, vector)


@pytest.mark.parametrize("options", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("whole", [True, False], ids=["flux", "sd3"])
def test_times_are_those_of_diffusers(options, whole):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    config, shift = scheduler.config, shift_of(scheduler)
    mu = calculate_shift(1024, base_shift=config.base_shift, max_shift=config.max_shift)
    even = torch.linspace(1, 1 / 7, 7).tolist() if whole else None
    scheduler.set_timesteps(7, sigmas=even, mu=mu if shift.dynamic else None)
    times = flow.times(shift, 7, 1024, whole)
    torch.testing.assert_close(times.float(), scheduler.sigmas, atol=1e-6, rtol=1e-6)
    assert times[0] == 1 and times[-1] == 0


def test_one_step_and_any_solver():
    model = ours(flux_pipeline(guided=False))
    with torch.no_grad():
        assert draw(model, noise(), 1).isfinite().all()
        euler, better = draw(model, noise(), 4), draw(model, noise(), 4, solver="dpmpp_2m")
    assert better.isfinite().all() and (euler - better).abs().max() > 1e-3


def test_what_a_scheduler_asks_for_and_is_not_here_is_named():
    with pytest.raises(UserError, match="of DDIMScheduler"):
        flow.from_config({"_class_name": "DDIMScheduler"}, "a.json")
    name = "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(UserError, match="a.json has use_karras_sigmas True"):
        flow.from_config({"_class_name": name, "use_karras_sigmas": True}, "a.json")


def test_guidance_that_a_model_does_not_have_is_refused():
    model = ours(flux_pipeline(guided=False))
    with torch.no_grad(), pytest.raises(UserError, match="told none; give guidance 1"):
        draw(model, noise(), 1, guidance=3.5)
    model = ours(sd3_pipeline())
    with torch.no_grad(), pytest.raises(UserError, match="give it as guidance"):
        draw(model, noise(), 1, true_guidance=3.5)


def test_what_does_not_fit_in_the_context_is_told():
    pipeline = sd3_pipeline()
    reader = Encoder(pipeline.tokenizer, pipeline.text_encoder)
    assert reader.cut("a red apple") == ""
    assert reader.cut("abc defghij klmnopqrs") == "opqrs"
    words = Encoder(pipeline.tokenizer_3, pipeline.text_encoder_3)
    assert words.cut("a pear", 8) == ""
    assert words.cut("a pear tree", 8).replace(" ", "") == "tree"


def test_t5_from_shapes():
    encoder = sd3_pipeline().text_encoder_3
    shapes = {name: value.shape for name, value in encoder.state_dict().items()}
    told = t5.config_of(shapes)
    assert {name: getattr(encoder.config, name) for name in told} == told
