"""Evaluation end to end on small data: protocols, references, files, and the numbers' names."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trilemma import drawing, evaluation, sampling
from trilemma.data import Dataset
from trilemma.errors import UserError
from trilemma.evaluation import describe, evaluate, nearest_neighbours, same_protocol, title
from trilemma.metrics import reference as references
from trilemma.metrics.features import Extractor, Features, extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.metrics.reading import read_images
from trilemma.model import Model, Phase


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("trilemma.metrics.speed._SECONDS", 0.01)


def images(count, seed=0, size=8, channels=1):
    """Return smooth random pictures: two of them are never alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 2, 2, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (255 * fine).round().to(torch.uint8)


def dataset(count=60, seed=1, split="test", **kind):
    array = images(count, seed, **kind).numpy()
    return Dataset("squares", split, f"{count}-{seed}-{split}-{kind}", array)


class Spy:
    """An extractor that counts the images it sees."""

    def __init__(self):
        self.seen = 0
        self.see = Extractor("spy", "0123", "none", self.look)

    def look(self, part):
        self.seen += len(part)
        flat = part.flatten(1).float() / 255
        return Features(flat, flat[:, ::2], flat[:, :5])


class Painter(Model):
    """Paints random pictures in `steps` calls."""

    def __init__(self):
        super().__init__()
        self.network = nn.Conv2d(1, 1, 1)

    def phases(self):
        return [Phase("none", lambda batch: {}, [])]

    def sample(self, condition, rng, *, steps: int = 3):
        x = rng.uniform(1, 8, 8) * 2 - 1
        for _ in range(steps):
            self.network(x)
        return x


def trained():
    recipe = {"run": {"recipe": "painter"}, "model": {}, "train": {}, "sample": {"steps": 2}}
    facts = {"shape": [1, 8, 8], "label_names": [], "attribute_names": []}
    return sampling.Trained(Painter().eval(), recipe, facts, {"seen": 640})


def test_a_tensor_against_a_data_set_gives_every_score_and_its_protocol():
    drawn, training = images(80, seed=3), dataset(70, seed=2, split="train")
    result = evaluate(drawn, dataset(), n=100, features=Spy().see, training=training)
    assert set(result["scores"]) == {
        "fd-spy", "sfd-spy", "kid-spy", "kid-spy-std", "swd-spy", "is-spy", "is-spy-std",
        "precision", "recall", "density", "coverage", "memorised",
    }  # fmt: skip
    assert result["protocol"] == {
        "features": "spy", "weights": "0123", "resize": "none", "precision": "float32",
        "data": "squares", "fingerprint": dataset().fingerprint, "split": "test",
        "reference_n": 60, "reference_size": [1, 8, 8], "n": 80, "size": [1, 8, 8],
        "balls_n": 60, "held_out_n": 60, "training_n": 70, "sampling": {"source": "tensor"},
    }  # fmt: skip
    assert any("100 images were asked for" in said for said in result["warnings"])
    assert any("are few" in said for said in result["warnings"])
    assert json.loads(json.dumps(result)) == result
    assert "speed" not in result
    seen = [statistics(x.flatten(1) / 255) for x in (drawn, dataset().tensor(slice(None)))]
    assert result["scores"]["fd-spy"] == pytest.approx(frechet_distance(*seen), rel=1e-5)


def test_training_images_are_seen_as_memorised_and_others_are_not():
    training, held_out = dataset(200, seed=2, split="train"), dataset(200)
    copied = evaluate(training.tensor(slice(0, 50)), held_out, features="pixels", training=training)
    fresh = evaluate(images(200, seed=9), held_out, features="pixels", training=training)
    assert copied["scores"]["memorised"] == 1
    assert fresh["scores"]["memorised"] < 0.2
    alone = evaluate(images(50, seed=9), held_out, features="pixels")
    assert "memorised" not in alone["scores"] and alone["protocol"]["training_n"] is None


def test_a_model_draws_and_its_cost_is_measured():
    result = evaluate(trained(), dataset(), n=30, features="pixels", seed=5, steps=4)
    assert result["speed"]["calls"] == 4 and result["speed"]["parameters"] == 2
    assert result["speed"]["batch"] == 30 and result["speed"]["images_per_second"] > 0
    assert result["protocol"]["sampling"] == {
        "recipe": "painter", "seen": 640, "seeds": [5, 34], "labels": None, "steps": 4,
    }  # fmt: skip
    drawn = trained().sample(30, seed=5)
    by_hand = evaluate(drawn, dataset(), n=30, features="pixels")
    assert by_hand["scores"] == result["scores"]
    own = evaluate(trained(), dataset(), n=30, features="pixels")
    assert own["protocol"]["sampling"]["steps"] == 2
    with pytest.raises(UserError, match="'stepps'.*steps"):
        evaluate(trained(), dataset(), n=30, features="pixels", stepps=4)


def test_unlike_protocols_are_not_compared():
    first = evaluate(trained(), dataset(), n=30, features="pixels", steps=1)
    second = evaluate(trained(), dataset(), n=30, features="pixels", steps=5, seed=7)
    same_protocol(first, second)
    fewer = evaluate(trained(), dataset(), n=20, features="pixels")
    with pytest.raises(UserError, match="cannot be compared: n is 30 and 20"):
        same_protocol(first, fewer)
    other = evaluate(trained(), dataset(seed=8), n=30, features="pixels")
    with pytest.raises(UserError, match="fingerprint"):
        same_protocol(first, other)
    lite = {"protocol": first["protocol"] | {"features": "lite0", "weights": "5793"}}
    with pytest.raises(UserError, match="features is pixels and lite0; weights"):
        same_protocol(first, lite)


def test_a_cached_reference_gives_identical_numbers_without_looking_again():
    spy, drawn, training = Spy(), images(40, seed=3), dataset(30, seed=2, split="train")
    first = evaluate(drawn, dataset(), features=spy.see, training=training)
    assert spy.seen == 40 + 60 + 30
    second = evaluate(drawn, dataset(), features=spy.see, training=training)
    assert spy.seen == 2 * 40 + 60 + 30
    assert first == second
    evaluate(drawn, dataset(seed=4), features=spy.see)
    assert spy.seen == 3 * 40 + 2 * 60 + 30
    evaluate(drawn, dataset(), features=replace(spy.see, weights="4567"))
    assert spy.seen == 4 * 40 + 3 * 60 + 30
    unknown = replace(spy.see, weights=None)
    evaluate(drawn, dataset(), features=unknown)
    evaluate(drawn, dataset(), features=unknown)
    assert spy.seen == 6 * 40 + 5 * 60 + 30


def test_a_cache_that_cannot_be_written_does_no_harm(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert evaluate(images(40), dataset(), features="pixels")["scores"]["fd-pixels"] > 0


def test_reference_files_are_written_and_read(tmp_path):
    see, drawn = Spy().see, images(40, seed=3)
    path = tmp_path / "mine.npz"
    references.save(references.of_dataset(dataset(), see, limit=99, pooled_only=False), path)
    with np.load(path) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "features"} <= set(file)
        assert file["mu"].shape == (64,) and file["sigma"].shape == (64, 64)
        mu, sigma = file["mu"], file["sigma"]
    whole = evaluate(drawn, dataset(), features=see)
    assert evaluate(drawn, path, features=see)["scores"] == whole["scores"]
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    bare = evaluate(drawn, tmp_path / "theirs.npz", features=see)
    assert set(bare["scores"]) == {"fd-spy", "is-spy", "is-spy-std"}
    assert bare["scores"]["fd-spy"] == whole["scores"]["fd-spy"]
    assert any("need the real images" in said for said in bare["warnings"])
    assert bare["protocol"]["reference_n"] is None
    array = dataset().images.transpose(0, 2, 3, 1)
    np.savez(tmp_path / "images.npz", arr_0=array)
    pictures = evaluate(drawn, tmp_path / "images.npz", features=see)
    assert pictures["scores"] == whole["scores"]
    # As guided-diffusion has them: statistics of all, and images of some.
    np.savez(tmp_path / "both.npz", arr_0=array[:30], mu=mu, sigma=sigma)
    both = evaluate(drawn, tmp_path / "both.npz", features=see)
    assert both["scores"]["fd-spy"] == whole["scores"]["fd-spy"]
    assert both["protocol"]["balls_n"] == 30


def test_reference_files_that_do_not_fit_are_refused(tmp_path):
    see, path = Spy().see, tmp_path / "mine.npz"
    references.save(references.of_dataset(dataset(), see, limit=99, pooled_only=False), path)
    with pytest.raises(UserError, match="made with weights 0123, not 4567"):
        evaluate(images(9), path, features=replace(see, weights="4567"))
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(UserError, match="holds weights; expected mu and sigma"):
        evaluate(images(9), tmp_path / "other.npz", features=see)
    np.savez(tmp_path / "short.npz", mu=np.ones(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="3 numbers.*64"):
        evaluate(images(9), tmp_path / "short.npz", features=see)
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(UserError, match="cannot be read"):
        evaluate(images(9), tmp_path / "text.npz", features=see)


def test_drawn_images_are_read_from_folders_zips_and_npz(tmp_path):
    drawn = images(12, channels=3)
    folder = tmp_path / "drawn"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "drawn.zip", "w") as archive:
        for i, image in enumerate(drawn):
            drawing.to_pil(image).save(folder / f"{i:05d}.png")
            archive.write(folder / f"{i:05d}.png", f"some/{i:05d}.png")
    Image.new("RGB", (99, 99)).save(folder / "grid.png")
    (folder / "notes.txt").write_text("no image")
    np.savez(tmp_path / "drawn.npz", arr_0=drawn.permute(0, 2, 3, 1).numpy())
    for source in (folder, tmp_path / "drawn.zip", tmp_path / "drawn.npz"):
        assert torch.equal(read_images(source), drawn)
        assert torch.equal(read_images(source, 5), drawn[:5])
    result = evaluate(folder, dataset(channels=3), features="pixels")
    assert result["protocol"]["sampling"] == {"source": str(folder)}
    Image.new("L", (8, 8), 7).save(folder / "00003.png")
    assert (read_images(folder)[3] == 7).all() and read_images(folder).shape == (12, 3, 8, 8)


def test_drawn_images_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        read_images(tmp_path)
    with pytest.raises(UserError, match="not a run, a folder or zip"):
        evaluate(tmp_path / "nothing", dataset())
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="8x8 and 8x9"):
        read_images(tmp_path)
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="b.png cannot be read"):
        read_images(tmp_path)
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 8, 8, 3)))
    with pytest.raises(UserError, match="float64.*expected uint8"):
        read_images(tmp_path / "float.npz")
    np.savez(tmp_path / "named.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="arr_0"):
        read_images(tmp_path / "named.npz")


def test_wrong_use_is_refused():
    with pytest.raises(UserError, match="drawn already"):
        evaluate(images(9), dataset(), features="pixels", steps=3)
    with pytest.raises(UserError, match="at least 2"):
        evaluate(images(9), dataset(), features="pixels", n=1)
    with pytest.raises(UserError, match="squares"):
        evaluate(images(9)[..., :4], "fashion", features="pixels")


def test_a_named_data_set_brings_its_training_images():
    drawn = images(20, size=28)
    result = evaluate(drawn, "fashion", features="pixels", split="train")
    assert result["protocol"]["split"] == "train"
    assert result["protocol"]["training_n"] == result["protocol"]["reference_n"] == 10_000
    assert result["protocol"]["held_out_n"] == 2000
    assert "memorised" in result["scores"]


def test_few_images_leave_out_what_needs_more():
    result = evaluate(images(4), dataset(), features=Spy().see)
    assert set(result["scores"]) == {"fd-spy", "sfd-spy", "kid-spy", "kid-spy-std", "swd-spy"}


def test_names_of_scores():
    keys = ["fd", "sfd", "kd", "kd_std", "inception_score", "swd", "coverage"]
    assert [title(key, "inception") for key in keys] == [
        "fid", "sfid", "kid", "kid-std", "is", "swd-inception", "coverage",
    ]  # fmt: skip
    assert [title(key, "lite0") for key in keys] == [
        "fd-lite0", "sfd-lite0", "kid-lite0", "kid-lite0-std", "is-lite0", "swd-lite0", "coverage",
    ]  # fmt: skip


def test_nearest_neighbours_finds_the_copied_image():
    training = dataset(50, seed=2, split="train")
    index, distance = nearest_neighbours(training.tensor([7, 3]), training, "pixels", k=2)
    assert index[:, 0].tolist() == [7, 3] and (distance[:, 0] < 1e-3).all()
    assert (distance[:, 1] > distance[:, 0]).all()
    again = nearest_neighbours(training.tensor([7, 3]), training.tensor(slice(None)), "pixels", k=2)
    assert torch.equal(again[0], index)


def test_results_are_told_in_a_table():
    table = describe(evaluate(trained(), dataset(), n=30, features="pixels"))
    told = dict(zip(*(column._cells for column in table.columns), strict=True))
    assert float(told["fd-pixels"]) > 0 and told["features"] == "pixels"
    assert "steps 2" in told["sampling"] and "few" in told["warning"]


def test_distance_between_two_sets():
    assert evaluation.frechet(images(30), images(30), "pixels") < 1e-9
    assert evaluation.frechet(images(30), images(30, seed=1) // 2, "pixels") > 1
    assert extractor("pixels").protocol["features"] == "pixels"
