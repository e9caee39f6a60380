"""Finding pictures by words: the measures, evaluation, search and what it keeps."""

import json

import pytest
import torch

import tiny
from trilemma import cli, evaluation, retrieval, sampling, training
from trilemma.data import load
from trilemma.errors import UserError
from trilemma.metrics.retrieval import accuracy, class_vectors, recalls


def test_recalls_against_counting_by_hand():
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.3, 0.4]])
    right = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0]]).bool()
    assert recalls(similarity, right, (1, 2, 3, 10)) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    right[1] = False  # a query without a right answer is left out
    assert recalls(similarity, right, (1, 2)) == pytest.approx([1 / 2, 1])
    with pytest.raises(ValueError, match="no query"):
        recalls(similarity, right & False)


def test_recall_of_chance():
    torch.manual_seed(0)
    similarity, right = torch.randn(2000, 50), torch.zeros(2000, 50, dtype=torch.bool)
    right[:, 7] = True
    assert recalls(similarity, right) == pytest.approx([0.02, 0.1, 0.2], abs=0.03)


def test_classes():
    prompts = torch.nn.functional.normalize(torch.randn(3, 4, 8), dim=2)
    vectors = class_vectors(prompts)
    assert vectors.norm(dim=1).allclose(torch.ones(3))
    assert accuracy(vectors @ vectors.T, torch.arange(3)) == 1


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny CLIP and the pictures it was trained on: red, green and blue ones, so named."""
    folder = tmp_path_factory.mktemp("clip")
    pictures = tiny.pictures(folder / "pictures", 30)
    for path in pictures.rglob("*.png"):
        name = ("red", "green", "blue")[int(path.parent.name[-1])]
        path.with_suffix(".txt").write_text(f"{name}\na {name} square")
    data = load(pictures, split="all")
    changes = [*tiny.overrides("clip"), "train.optimizer.lr=0.003", "train.ema_halflife=0"]
    changes += ["train.warmup=0", "model.dim=16", "model.text.embedding=16"]
    changes += ["model.image.blocks=0"]
    out = folder / "run"
    training.train("clip", data, out=out, steps=80, quiet=True, overrides=changes)
    return out, pictures


def test_a_trained_one_finds_what_words_say(run):
    out, pictures = run
    trained = sampling.load(out, "cpu")
    told = evaluation.evaluate(trained, load(pictures, split="all"))
    scores, protocol = told["scores"], told["protocol"]
    assert scores["text to image, recall@1"] > 0.9 and scores["image to text, recall@1"] > 0.9
    assert scores["text to image, recall@10"] >= scores["text to image, recall@1"]
    assert protocol["pictures"] == 30 and protocol["texts"] == 6 and protocol["classes"] == 3
    assert protocol["by chance, recall@1"] == pytest.approx(1 / 3, abs=0.01)
    found, sheet, skipped = retrieval.search(trained, pictures, text="a red square", n=6)
    assert len(found) == 6 and not skipped and sheet.size == (5 * 130 - 2, 2 * 130 - 2)
    assert all(name.startswith("class0/") for name, _ in found)
    cosines = [cosine for _, cosine in found]
    assert cosines == sorted(cosines, reverse=True) and -1 <= cosines[-1] and cosines[0] <= 1.001
    classes = retrieval.zero_shot(
        trained,
        load(pictures, split="all").tensor(slice(9)),
        ["red", "green", "blue"],
        ["a {} square"],
    )
    label = load(pictures, split="all").label[:9]
    assert accuracy(classes, torch.from_numpy(label)) == 1


def test_search_by_a_picture_and_what_is_kept(run, monkeypatch):
    out, pictures = run
    trained = sampling.load(out, "cpu")
    one = next((pictures / "class1").glob("*.png"))
    found, _, _ = retrieval.search(trained, pictures, image=one, n=3)
    assert found[0][0] == f"class1/{one.name}" and found[0][1] == pytest.approx(1, abs=1e-3)
    seen = []
    embed = retrieval.embed_images
    monkeypatch.setattr(
        retrieval,
        "embed_images",
        lambda t, images, *rest: seen.append(len(images)) or embed(t, images),
    )
    again, _, _ = retrieval.search(trained, pictures, image=one, n=3)
    assert again == found and seen == [1], "a folder that was searched is embedded anew"
    torn = retrieval._Kept(trained).path
    torn.write_bytes(b"torn")
    assert retrieval.search(trained, pictures, image=one, n=3)[0] == found
    with torch.no_grad():
        trained.model.join.image.weight.add_(1)
    assert retrieval._Kept(trained).path != torn, "other weights, the same vectors"


def test_search_on_the_command_line(run, tmp_path, monkeypatch, capsys):
    out, pictures = run
    (pictures / "torn.png").write_bytes(b"\x89PNG torn")
    asked = ["trilemma", "search", str(out), str(pictures), "--text", "blue", "-n", "2"]
    asked += ["--out", str(tmp_path / "a" / "sheet.png"), "--device", "cpu"]
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", asked + more)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code in (0, None)
    printed, told = capsys.readouterr()
    assert "left out: torn.png" in told and (tmp_path / "a" / "sheet.png").exists()
    lines, _, rest = printed.partition("{")
    assert all("class2/" in line for line in lines.splitlines()) and len(lines.splitlines()) == 2
    assert [row["picture"][:6] for row in json.loads("{" + rest)["found"]] == ["class2"] * 2
    (pictures / "torn.png").unlink()


def test_bad_input(run, tmp_path):
    out, pictures = run
    trained = sampling.load(out, "cpu")
    with pytest.raises(UserError, match="either a text or a picture"):
        retrieval.search(trained, pictures)
    with pytest.raises(UserError, match="either a text or a picture"):
        retrieval.search(trained, pictures, text="red", image="a.png")
    with pytest.raises(UserError, match=r"gone\.png cannot be used"):
        retrieval.search(trained, pictures, image=tmp_path / "gone.png")
    with pytest.raises(UserError, match="n is 0"):
        retrieval.search(trained, pictures, text="red", n=0)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(UserError, match=r"holds no picture that can be used \(torn\.png"):
        retrieval.search(trained, tmp_path, text="red")
    plain = tiny.pictures(tmp_path / "plain", 6, classes=1)
    with pytest.raises(UserError, match="neither captions nor classes"):
        evaluation.evaluate(trained, load(plain, split="all"))
    with pytest.raises(UserError, match="the model knows"):
        evaluation.evaluate(trained, load(plain, split="all", size=32))
    training.train(
        "ae", load(pictures, split="all"), out=tmp_path / "ae", steps=1, quiet=True,
        overrides=tiny.overrides("ae"),
    )  # fmt: skip
    with pytest.raises(UserError, match="ae knows nothing of words"):
        retrieval.search(sampling.load(tmp_path / "ae"), pictures, text="red")
    with pytest.raises(UserError, match="no captions.*--captions"):
        training.train(
            "clip", load(plain, split="all"), out=tmp_path / "c", steps=1, quiet=True,
            overrides=tiny.overrides("clip"),
        )  # fmt: skip
