"""Stable Diffusion against diffusers and transformers: the same weights, the same noise."""

import pytest
import torch

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import stable_tiny as tiny  # noqa: E402

from trilemma.batch import Rng  # noqa: E402
from trilemma.stable import load  # noqa: E402

pytestmark = pytest.mark.slow

SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"set_alpha_to_one": False, "clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
}
TEXTS, NEGATIVE = ["a red apple", "two shoes"], "blurred"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a pipeline of each version and the folder that it is saved in."""
    made = {}

    def get(version, channels=4, prediction="epsilon"):
        key = version, channels, prediction
        if key not in made:
            folder = tmp_path_factory.mktemp("sd")
            pipe = tiny.pipeline(version, channels, prediction)
            pipe.save_pretrained(folder, safe_serialization=True)
            made[key] = pipe, folder
        return made[key]

    return get


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < tolerance


def scheduled(pipe, name, **told):
    kind, own = SCHEDULERS[name]
    pipe.scheduler = kind(
        **tiny.SCALED, **tiny.LEADING, **own, prediction_type=pipe.scheduler.config.prediction_type,
        **told,
    )  # fmt: skip
    return pipe


@pytest.mark.parametrize(
    ("version", "prediction"), [("1", "epsilon"), ("2", "v_prediction"), ("XL", "epsilon")]
)
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_text_to_image(saved, monkeypatch, version, prediction, solver):
    pipe, folder = saved(version, prediction=prediction)
    stable = load.load(folder, "cpu", precision="fp32")
    options = {"guidance": 5.0, "steps": 4, "solver": solver}
    ours = stable.draw(TEXTS, Rng([3, 4]), negative=NEGATIVE, **options)
    theirs = tiny.draw_theirs(
        scheduled(pipe, solver), monkeypatch, [3, 4], prompt=TEXTS,
        negative_prompt=[NEGATIVE] * 2, guidance_scale=5.0, num_inference_steps=4,
        height=32, width=32,
    )  # fmt: skip
    close(ours, theirs)
