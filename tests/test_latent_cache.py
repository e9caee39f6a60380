"""What a frozen codec makes of pictures, computed once: the file, and training on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import tiny
from trilemma import checkpoint, codecs, data, latents, sampling, training
from trilemma.errors import Interrupted, UserError
from trilemma.settings import Length

LONG = Length(images=10**6)
CPU = torch.device("cpu")
PRIORS = {  # who learns on whose latents or codes: the first stage and where it is named
    "kl-f4": ("latent-diffusion", "stage"),
    "vq-f4": ("latent-diffusion", "stage"),
    "vqvae": ("vq-transformer", "tokenizer"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pictures"), 70)  # more than one group


@pytest.fixture(scope="module")
def pictures(folder):
    return data.load(folder, split="all")


@pytest.fixture(scope="module", params=PRIORS)
def stage(request, pictures, tmp_path_factory):
    """A first stage's name and the folder of its run."""
    out = tmp_path_factory.mktemp("stage") / "run"
    fit(request.param, pictures, out, "train.batch=16")
    return request.param, out


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def files(tmp_path):
    return sorted((tmp_path / "cache" / "trilemma" / "latents").glob("*"))


def fit(name, pictures, out, *changes, **options):
    changes = [*tiny.overrides(name), "train.log_every=1", "train.precision=fp32", *changes]
    options = {"steps": 10, "seed": 1, "quiet": True, **options}
    return training.train(name, pictures, out=out, overrides=changes, **options)


def using(stage):
    """Return the recipe over a first stage, and the changes that name it."""
    kind, out = stage
    name, key = PRIORS[kind]
    changes = [f'model.codec.{key}.path="{out}"']
    if name == "latent-diffusion":
        channels = sampling.load(out).model.latent_shape[0]
        changes += [f"model.network.{way}_channels={channels}" for way in ("in", "out")]
    return name, changes


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(stage, pictures, tmp_path_factory):
    name, changes = using(stage)
    out = tmp_path_factory.mktemp("prior") / "run"
    return fit(name, pictures, out, *changes, "train.cache=false", steps=1).model


@pytest.mark.parametrize("flip", [False, True])
def test_batches_bring_what_the_codec_makes_of_their_pictures(model, pictures, flip):
    kept = latents.keep(model, pictures, flip, LONG, 8, CPU)
    assert kept.shape[:2] == (1 + flip, len(pictures)) and kept.itemsize == 2
    stream = data.batches(pictures, 12, seed=3, flip=flip, kept=kept)
    for batch in (next(stream) for _ in range(4)):
        for part in batch.split(3):
            wanted, found = model.codec.encode(part.image), codecs.encoded(model.codec, part)
            assert found.dtype == wanted.dtype and found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=2**-10)
        assert batch.to("cpu").kept is not None


def test_training_on_what_is_kept_is_training_on_pictures(stage, pictures, tmp_path, monkeypatch):
    name, changes = using(stage)
    fit(name, pictures, tmp_path / "a", *changes, "train.cache=false")
    assert not files(tmp_path)
    fit(name, pictures, tmp_path / "b", *changes)
    one, two = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert one == pytest.approx(two, rel=2e-3) and len(one) == 10
    (file,) = files(tmp_path)
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(latents, "_fill", None)  # what is there is not computed again
    again = fit(name, pictures, tmp_path / "c", *changes)
    assert losses(tmp_path / "c") == two and file.stat().st_mtime_ns == written
    assert again.sample(2, seed=3).shape == (2, *pictures.shape)


def test_a_run_goes_on_bit_for_bit_though_the_file_is_gone(stage, pictures, tmp_path):
    def stop(trained, elapsed):
        raise Interrupted("as by Ctrl-C")

    name, changes = using(stage)
    changes.append("train.save_every=0")
    whole = fit(name, pictures, tmp_path / "whole", *changes)
    with pytest.raises(Interrupted):
        fit(name, pictures, tmp_path / "parts", *changes, probe=stop, probes=2)
    for file in files(tmp_path):
        file.unlink()
    parts = fit(name, pictures, tmp_path / "parts", *changes, resume=True)
    one, two = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one) and len(files(tmp_path)) == 1


def test_other_weights_pictures_or_mirroring_have_a_file_of_their_own(
    model, folder, pictures, tmp_path
):
    def keep(pictures, flip=False):
        return latents.keep(model, pictures, flip, LONG, 8, CPU)

    before = np.array(keep(pictures))
    keep(pictures, True)
    keep(data.load(folder, split="train"))
    assert len(files(tmp_path)) == 3
    weight = next(model.codec.parameters())
    was = weight.clone()
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        assert not np.array_equal(keep(pictures), before) and len(files(tmp_path)) == 4
    finally:
        with torch.no_grad():
            weight.copy_(was)
    assert np.array_equal(keep(pictures), before) and len(files(tmp_path)) == 4


def test_what_does_not_pay_is_not_kept(model, pictures, tmp_path, monkeypatch):
    count = len(pictures)
    for flip, length, pays in (
        (False, Length(images=count), True),
        (False, Length(images=count - 1), False),
        (True, Length(images=count), False),
        (False, Length(steps=count // 8), False),
        (False, Length(seconds=1e-6), False),
        (True, Length(seconds=1e6), True),
    ):
        kept = latents.keep(model, pictures, flip, length, 8, CPU)
        assert (kept is not None) == pays, (flip, length)
        for file in files(tmp_path):
            file.unlink()


def test_a_model_of_pictures_keeps_nothing(pictures, tmp_path):
    model = fit("quick-diffusion", pictures, tmp_path / "run", steps=1).model
    assert latents.keep(model, pictures, False, LONG, 8, CPU) is None and not files(tmp_path)


def test_a_file_is_whole_or_not_there(model, pictures, tmp_path, monkeypatch):
    def fail(image):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.codec, "keep", fail)
        latents.keep(model, pictures, False, LONG, 8, CPU)
    assert not files(tmp_path) and not list(tmp_path.rglob(".*"))
    assert latents.keep(model, pictures, False, LONG, 8, CPU) is not None
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be kept in .*XDG_CACHE_HOME.*train.cache=false"):
        latents.keep(model, pictures, False, LONG, 8, CPU)


def test_encoding_counts_as_training(model, pictures, monkeypatch, tmp_path, stage):
    name, changes = using(stage)
    clock = iter(range(0, 10**9, 100))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    trained = fit(name, pictures, tmp_path / "run", *changes, steps=9)
    spent = trained.progress["elapsed"]
    assert spent >= 100 * (9 + 1)
    for file in files(tmp_path):
        file.unlink()
    again = fit(name, pictures, tmp_path / "run", *changes, steps=9, resume=True)
    assert again.progress["elapsed"] == spent and not files(tmp_path)  # it was at its end


@pytest.mark.slow
def test_two_processes_read_one_file(stage, folder, tmp_path):
    name, changes = using(stage)
    sets = [*tiny.overrides(name), "train.log_every=1", "train.precision=fp32", *changes]
    sets += ["train.warmup=0", "train.optimizer={type='adam', lr=1e-5}"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={tiny.free_port()}", "-m", "trilemma"]
    for out, launch in (("one", ["-m", "trilemma"]), ("two", torchrun)):
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / out)}
        command = [sys.executable, *launch, "train", name, "--data", str(folder), "--steps", "12"]
        command += [word for change in sets for word in ("--set", change)]
        command += ["--out", str(tmp_path / f"run-{out}"), "--device", "cpu"]
        subprocess.run(command, check=True, env=environ, capture_output=True)
        assert len(list((tmp_path / out / "trilemma" / "latents").iterdir())) == 1
    assert losses(tmp_path / "run-one") == pytest.approx(losses(tmp_path / "run-two"), rel=1e-3)
    one, two = (checkpoint.read_model(tmp_path / f"run-{out}")[0] for out in ("one", "two"))
    apart = max((one[key].float() - two[key].float()).abs().max().item() for key in one)
    assert apart < 1e-3
