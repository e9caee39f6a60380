"""Files that are all or nothing."""

import pytest
import torch
from safetensors.torch import save_file

import trilemma
from trilemma import checkpoint
from trilemma.errors import UserError
from trilemma.tuning import tune_steps


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    checkpoint.write(path, {"a": torch.arange(3.0)}, {"recipe": {"x": [1]}})
    tensors, facts = checkpoint.read(path)
    assert torch.equal(tensors["a"], torch.arange(3.0)) and facts["recipe"] == {"x": [1]}
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_where_there_is_no_room_nothing_is_left_and_the_old_file_stays(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.safetensors"
    checkpoint.write(path, {"a": torch.arange(3.0)}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model.safetensors cannot be written: .*too large"):
            checkpoint.write(path, {"a": torch.ones(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert len(checkpoint.read(path)[0]["a"]) == 3


def test_a_tensor_of_two_names_is_written_once(tmp_path):
    one = torch.randn(1000)
    tensors = {"a": one, "b": one, "c": one.clone()}
    checkpoint.write(tmp_path / "a", tensors, {})
    assert 4 * 2000 < (tmp_path / "a").stat().st_size < 4 * 3000
    read, facts = checkpoint.read(tmp_path / "a")
    assert read.keys() == tensors.keys() and "shared" not in facts
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_optimizer_state_round_trip():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    tensors = {}
    rest = checkpoint.flatten("o", optimizer.state_dict(), tensors)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.5)
    other.load_state_dict(checkpoint.unflatten(rest, tensors))
    assert other.param_groups[0]["lr"] == 0.1
    for key, value in optimizer.state[parameter].items():
        assert torch.equal(next(iter(other.state.values()))[key], value)


def test_what_is_not_ours_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.read(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a file")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read(tmp_path / "bad.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not one that Trilemma wrote"):
        checkpoint.read(tmp_path / "other.safetensors")
    checkpoint.write(tmp_path / "new.safetensors", {}, {"format": 99})
    with pytest.raises(UserError, match="newer Trilemma"):
        checkpoint.read(tmp_path / "new.safetensors")


def test_what_a_file_lacks_is_named(tmp_path):
    whole = {"model": {}, "train": {}, "run": {}}
    facts = {"recipe": whole, "progress": {}}
    facts["data"] = {"shape": [1, 2, 2], "label_names": [], "attribute_names": []}
    path = tmp_path / "model.safetensors"
    checkpoint.write(path, {}, facts)
    checkpoint.read_model(path)
    for lacking, told in (
        ({"recipe": {"model": {}}}, "its recipe, with model, train, run"),
        ({"recipe": {**whole, "sample": "x"}}, "its recipe"),
        ({"data": {"shape": [1, 2, 2]}}, "its data, with shape, label_names"),
        ({"progress": None}, "its progress: it is damaged"),
        ({"shared": {"a": "b"}}, "lacks b"),
        ({"format": "1"}, "does not tell its format"),
    ):
        checkpoint.write(path, {}, {**facts, **lacking})
        with pytest.raises(UserError, match=told):
            checkpoint.read_model(path)
    torch.save({}, path)
    with pytest.raises(UserError, match="is a pickle, which can run any program"):
        checkpoint.read_model(path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="checkpoint from elsewhere.*sample. and .trilemma finetu"):
        checkpoint.read_model(tmp_path)


def test_weights_must_fit():
    module = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"missing: bias; unknown: other; shape: weight \(1,\)"):
        checkpoint.load_weights(module, {"weight": torch.ones(1), "other": torch.ones(1)}, "x")


def test_packaged_models_draw_and_fit_in_a_clone(tmp_path):
    names = checkpoint.packaged_models()
    assert names == ["emoji", "fashion"]
    for name in names:
        assert (checkpoint.PACKAGED / f"{name}.safetensors").stat().st_size <= 16 * 2**20
        assert (checkpoint.PACKAGED / f"LICENSE-{name}.txt").is_file()
    boots = trilemma.load("fashion").sample(2, label="Ankle boot", steps=2)
    assert boots.shape == (2, 1, 28, 28) and boots.float().std() > 10
    squares = trilemma.load("emoji").sample(2, text=["red square", "blue square"], steps=4)
    red, blue = squares.float()
    assert red[0].mean() > red[2].mean() + 30 and blue[2].mean() > blue[0].mean() + 30


def test_a_run_goes_before_a_packaged_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion").mkdir()  # a folder of pictures, say
    assert checkpoint.model_file("fashion").parent == checkpoint.PACKAGED
    checkpoint.write(tmp_path / "fashion" / "model.safetensors", {"a": torch.ones(1)}, {})
    assert checkpoint.model_file("fashion").parent.name == "fashion"
    with pytest.raises(UserError, match="one of the packaged models: .*fashion"):
        checkpoint.read_model("fasion")
    with pytest.raises(UserError, match="is a packaged model"):
        tune_steps(checkpoint.PACKAGED / "fashion.safetensors")
