"""Muon: its direction, its split of the parameters, its state."""

import copy

import pytest
import torch
from torch import nn

from trilemma.optim import OPTIMIZERS, Muon, orthogonal


@pytest.mark.parametrize("rows,columns", [(24, 24), (20, 60), (60, 20)])
def test_orthogonal_is_the_polar_factor(rows, columns):
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns)
    out = orthogonal(matrices)
    assert out.shape == matrices.shape and out.dtype == torch.float32
    values = torch.linalg.svdvals(out)
    # A random square matrix has singular values near 0, which the rounds do not lift to 1.
    assert values.quantile(0.1) > 0.6 and values.max() < 1.3
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    exact = u @ vt
    for a, b in zip(out, exact, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.97
        assert torch.allclose(orthogonal(matrices * 1000), out, atol=0.02)


def test_orthogonal_of_nothing_is_nothing():
    assert (orthogonal(torch.zeros(2, 20, 30)) == 0).all()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 4))


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - x.mean((1, 2, 3))[:, None]).square().mean().backward()
        optimizer.step()


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    net = network()
    muon, adamw = Muon(net.parameters()).param_groups
    assert [p.shape for p in muon["params"]] == [net[0].weight.shape]  # the head has 4 rows
    assert len(adamw["params"]) == 3
    (only,) = Muon([net[0].bias]).param_groups
    assert only["kind"] == "adamw"


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_rest_is_stepped_as_torchs_adamw(decay):
    ours, theirs = network()[3:], network()[3:]
    x = torch.randn(8, 512)
    a = Muon(ours.parameters(), adam_lr=3e-3, betas=(0.8, 0.95), weight_decay=decay)
    b = torch.optim.AdamW(theirs.parameters(), 3e-3, betas=(0.8, 0.95), weight_decay=decay)
    for net, optimizer in ((ours, a), (theirs, b)):
        for step in range(5):
            optimizer.zero_grad()
            net(x * (step + 1)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_step_has_the_size_of_adams():
    weight = nn.Parameter(torch.zeros(48, 96))
    weight.grad = torch.randn(48, 96) * 1e-4
    Muon([weight], lr=1e-2).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.2)


def test_layout_does_not_matter():
    plain, last = network(), network().to(memory_format=torch.channels_last)
    for net in (plain, last):
        train(net, Muon(net.parameters()), 3)
    torch.testing.assert_close(plain.state_dict(), last.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_saved_state_goes_on_bit_for_bit():
    whole = network()
    train(whole, Muon(whole.parameters()), 6)
    first = network()
    optimizer = Muon(first.parameters())
    train(first, optimizer, 3)
    saved, state = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    second = network()
    second.load_state_dict(saved)
    optimizer = OPTIMIZERS["muon"](second.parameters())
    optimizer.load_state_dict(state)
    train(second, optimizer, 3, start=3)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_has_no_gradient_stays():
    net = network()
    before = copy.deepcopy(net.state_dict())
    optimizer = Muon(net.parameters(), weight_decay=0.1)
    optimizer.step()
    net[3].bias.grad = torch.ones(4)
    optimizer.step()
    moved = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert moved == ["3.bias"]


def test_it_fits_an_ill_conditioned_matrix_sooner_than_adam():
    torch.manual_seed(0)
    x = torch.randn(256, 64) * torch.logspace(0, -2, 64)
    true = torch.randn(64, 32)
    loss = {}
    for name, lr in (("muon", 0.05), ("adam", 0.01)):
        weight = nn.Parameter(torch.zeros(32, 64))
        optimizer = OPTIMIZERS[name]([weight], lr=lr)
        for _ in range(150):
            optimizer.zero_grad()
            error = (x @ weight.T - x @ true).square().mean()
            error.backward()
            optimizer.step()
        loss[name] = error.item()
    assert loss["muon"] < 0.5 * loss["adam"]
