"""The choices of device, number format, layout and compilation."""

import logging

import pytest
import torch
from torch import nn

from trilemma import device
from trilemma.errors import UserError

CPU = torch.device("cpu")


def test_pick_the_named_or_the_fastest():
    assert device.pick("cpu") == CPU
    assert device.pick().type in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:1"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match=f"device '{name}' is not there; this machine has .*cpu"):
        device.pick(name)


def test_precision():
    assert device.dtype("fp32", CPU) == torch.float32
    assert device.dtype("bf16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="'half' is not known; use auto, bf16, fp32"):
        device.dtype("half", CPU)


@pytest.mark.parametrize(
    "can, gain, expected",
    [(True, 2.0, torch.bfloat16), (True, 0.6, torch.float32), (False, 2.0, torch.float32)],
)
def test_auto_precision_is_bfloat16_only_where_the_processor_gains(
    monkeypatch, can, gain, expected
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: can)
    monkeypatch.setattr(device, "_bf16_gain", lambda: gain)
    assert device.dtype("auto", CPU) == expected


def test_the_gain_is_measured():
    assert 0.01 < device._bf16_gain() < 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_multiplies_in_the_format_and_keeps_weights(dtype):
    layer = nn.Linear(4, 4)
    with device.autocast(dtype, CPU):
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_prepare_changes_the_layout_and_no_number():
    module = nn.Conv2d(4, 8, 3)
    before = module.weight.detach().clone()
    assert device.prepare(module, CPU, torch.bfloat16) is module
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module.weight, before)


def test_compile_off_and_auto_on_a_cpu_leave_the_module_alone(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: pytest.fail("compiled"))
    for mode in ("off", "auto"):
        device.maybe_compile(nn.Linear(2, 2), mode, CPU)
    with pytest.raises(UserError, match="compile 'yes' is not known; use auto, on or off"):
        device.maybe_compile(nn.Linear(2, 2), "yes", CPU)


def test_where_nothing_compiles_one_line_says_so(monkeypatch, caplog):
    def broken(function):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    device._compiler_trouble.cache_clear()
    module = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING):
        device.maybe_compile(module, "on", CPU)
    device._compiler_trouble.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "not compiled, so slower: No working C++ compiler found; compile=off silences this"
    ]
    assert module(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.slow
def test_a_compiled_module_keeps_its_names_and_numbers():
    module = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
    names, x = list(module.state_dict()), torch.randn(3, 4)
    expected = module(x)
    device.maybe_compile(module, "on", CPU)
    assert list(module.state_dict()) == names
    assert torch.allclose(module(x), expected, atol=1e-6)


def test_synchronize():
    device.synchronize(CPU)
