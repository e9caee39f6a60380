"""The state-space network: its scan against the recurrence, its orders, what it hears."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from trilemma.networks.dit import DiT
from trilemma.networks.layers import Embedded
from trilemma.networks.mamba import ORDERS, Block, Mamba, Reorder, order, scan
from trilemma.profile import flops

WIDTH = 16


def recurrence(x, log_decay, b, c):
    """The definition, step by step."""
    h = torch.zeros(*x.shape[:1], x.shape[2], b.shape[2], x.shape[3], dtype=x.dtype)
    y = []
    for t in range(x.shape[1]):
        taken = b[:, t, None, :, None] * x[:, t, :, None, :]  # (B, H, S, P)
        h = log_decay[:, t, :, None, None].exp() * h + taken
        y.append((c[:, t, None, None] @ h)[:, :, 0])
    return torch.stack(y, dim=1)


def sequence(count, scale=1.0, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(2, count, 3, 4, dtype=dtype)
    log_decay = -scale * F.softplus(torch.randn(2, count, 3, dtype=dtype))
    b, c = torch.randn(2, 2, count, 5, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, log_decay, b, c)]


@pytest.mark.parametrize("count, chunk", [(1, 4), (7, 16), (8, 4), (21, 4), (37, 8), (9, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_the_scan_is_the_recurrence(count, chunk, scale):
    given = sequence(count, scale)
    y, expected = scan(*given, chunk=chunk), recurrence(*given)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    up = torch.randn_like(y)
    gradients = (torch.autograd.grad(out, given, up) for out in (y, expected))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def test_the_scan_does_not_overflow():
    x, log_decay, b, c = sequence(300, dtype=torch.float32)
    log_decay = log_decay.detach().clone()
    log_decay[:, ::7] = -1e4  # everything is forgotten
    log_decay[:, 1::7] = 0.0  # nothing is
    log_decay.requires_grad_()
    y = scan(x, log_decay, b, c)
    double = (tensor.double() for tensor in (x, log_decay, b, c))
    torch.testing.assert_close(y.double(), recurrence(*double), atol=1e-4, rtol=1e-4)
    y.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, log_decay, b, c))


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_visits_every_patch_once(name):
    path = order(name, 3, 4)
    assert sorted(path.tolist()) == list(range(12))
    if name.startswith("zigzag"):
        rows, columns = path // 4, path % 4
        assert ((rows.diff().abs() + columns.diff().abs()) == 1).all()  # to a neighbour each time


def test_another_order_and_its_gradient_are_those_of_indexing():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    path = order("zigzag", 4, 3)
    reordered = Reorder.apply(x, path, path.argsort())
    assert torch.equal(reordered, x[:, path])
    up = torch.randn_like(x)
    expected = torch.autograd.grad(x[:, path], x, up)
    assert torch.equal(torch.autograd.grad(reordered, x, up)[0], expected[0])
    block = Block(8, 2, 8, 4)
    tokens = torch.randn(2, 12, 8)
    assert torch.equal(block(tokens, None, 3), block(tokens, order("rows", 3, 4), 3))


def test_orders_are_what_they_are_called():
    assert order("rows", 2, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert order("columns", 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert order("zigzag", 2, 3).tolist() == [0, 1, 2, 5, 4, 3]
    assert order("columns-reversed", 2, 3).tolist() == [5, 2, 4, 1, 3, 0]


def small(**options):
    """A network of three blocks whose zero-initialised layers speak too."""
    torch.manual_seed(0)
    settings = {"in_channels": 3, "out_channels": 3, "size": 8, "patch": 2}
    settings |= {"width": WIDTH, "depth": 3, "state": 4, "head_dim": 8}
    network = Mamba(**settings | options)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def batch(count=2):
    torch.manual_seed(1)
    vector = torch.randn(count, WIDTH)
    return torch.randn(count, 3, 8, 8), torch.rand(count), Embedded(vector=vector)


def test_a_new_network_answers_zero():
    network = Mamba(3, 6, 8, width=WIDTH, depth=2, head_dim=8)
    out = network(*batch())
    assert out.shape == (2, 6, 8, 8)
    assert not out.any()


def test_every_parameter_learns():
    network = small()
    x, time, embedded = batch()
    embedded.vector.requires_grad_()
    network(x, time, embedded).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert embedded.vector.grad.abs().min() > 0


def test_time_and_condition_are_heard():
    network = small(in_channels=5)
    x, time, embedded = batch()
    vector, image = embedded.vector, torch.randn(2, 2, 8, 8)
    out = network(x, time, Embedded(vector=vector, image=image))
    for other in (
        network(x, time + 0.1, Embedded(vector=vector, image=image)),
        network(x, time, Embedded(vector=vector + 1, image=image)),
        network(x, time, Embedded(vector=vector, image=image + 1)),
        network(x, time, Embedded(image=image)),
    ):
        assert (out - other).abs().max() > 1e-4


@pytest.mark.parametrize("name", ORDERS)
def test_every_patch_sees_all_others(name):
    torch.manual_seed(0)
    block = Block(8, 2, 8, 4)
    torch.nn.init.zeros_(block.local.weight)
    block.local.weight.data[:, :, 1, 1] = 1  # no looking at neighbours on the grid
    x = torch.randn(1, 12, 8, requires_grad=True)
    for place in (0, 5, 11):
        (seen,) = torch.autograd.grad(block(x, order(name, 3, 4), 3)[0, place].sum(), x)
        assert (seen.abs().sum(2) > 0).all()


def test_the_order_matters():
    x, time, embedded = batch()
    outs = [small(orders=[name])(x, time, embedded) for name in ("rows", "columns", "zigzag")]
    assert min((outs[i] - outs[i - 1]).abs().max() for i in range(3)) > 1e-4


def taken(network, size):
    """Operations, and bytes kept for the backward pass, of one picture."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor.detach()

    x, time = torch.randn(1, 3, size, size), torch.rand(1)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        operations = flops(lambda: network(x, time))
    return operations, sum(size for _, size in kept.values())


def test_work_and_memory_are_linear_in_the_number_of_patches():
    network = small(head_dim=4)
    few, many = taken(network, 32), taken(network, 64)  # 256 and 1,024 patches
    assert many[0] / few[0] == pytest.approx(4, rel=0.02)
    assert many[1] / few[1] == pytest.approx(4, rel=0.05)
    transformer = DiT(3, 3, 32, width=WIDTH, depth=3, heads=2)
    few, many = taken(transformer, 32), taken(transformer, 64)
    assert many[0] / few[0] > 10


def test_an_image_does_not_see_its_batch():
    network = small()
    x, time, embedded = batch(3)
    alone = network(x[1:2], time[1:2], Embedded(vector=embedded.vector[1:2]))
    torch.testing.assert_close(alone, network(x, time, embedded)[1:2], atol=1e-5, rtol=1e-5)


def test_other_sizes_than_the_trained_one():
    assert small()(torch.randn(1, 3, 12, 16), torch.rand(1)).shape == (1, 3, 12, 16)


def test_bfloat16_agrees_with_float32():
    network = small()
    x, time, embedded = batch(4)

    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = network(x, time, embedded).float()
        gradients = torch.autograd.grad(out.square().mean(), list(network.parameters()))
        return out, torch.cat([g.flatten() for g in gradients])

    (expected, exact), (rounded, gradients) = run(False), run(True)
    assert (rounded - expected).norm() < 0.03 * expected.norm()
    assert F.cosine_similarity(gradients, exact, dim=0) > 0.99


def test_what_does_not_fit_is_explained():
    with pytest.raises(ValueError, match="'spiral' is not one of rows, columns, zigzag"):
        small(orders=["rows", "spiral"])
    with pytest.raises(ValueError, match="2 times the width 12 must be a multiple of the 32 chan"):
        small(width=12, head_dim=32)
    with pytest.raises(ValueError, match="9x8 .* multiples of 2"):
        small()(torch.randn(1, 3, 9, 8), torch.rand(1))
    with pytest.raises(ValueError, match="no tokens; use networks.dit.DiT"):
        small()(*batch()[:2], Embedded(tokens=torch.randn(2, 3, WIDTH)))
