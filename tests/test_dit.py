"""The diffusion transformer: its four conditionings, positions, and the published network."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from trilemma.networks.dit import CONDITIONINGS, POSITIONS, DiT
from trilemma.networks.layers import Embedded, patchify, sincos, turned, turns, unpatchify

WIDTH = 32


def small(**options):
    """A DiT of two blocks whose zero-initialised layers speak too."""
    torch.manual_seed(0)
    settings = {"in_channels": 3, "out_channels": 3, "size": 8, "patch": 2}
    settings |= {"width": WIDTH, "depth": 2, "heads": 2}
    network = DiT(**settings | options)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def batch(count=2, size=8):
    torch.manual_seed(1)
    vector = torch.randn(count, WIDTH)
    return torch.randn(count, 3, size, size), torch.rand(count), Embedded(vector=vector)


THE_PAPERS = [name for name in CONDITIONINGS if name != "adaln-cross"]  # that: tests/test_words.py
every_conditioning = pytest.mark.parametrize("conditioning", THE_PAPERS)
every_position = pytest.mark.parametrize("positions", POSITIONS)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_come_together_again(patch):
    x = torch.randn(2, 3, 8, 12)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, 96 // patch**2, 3 * patch**2)
    assert torch.equal(unpatchify(tokens, patch, 8, 12), x)
    corner = x[:, :, :patch, patch : 2 * patch].flatten(1)
    assert torch.equal(tokens[:, 1], corner)  # row by row


def test_positions_tell_places_apart_by_their_axes():
    table = sincos(4, 6, 16).view(4, 6, 2, 8)
    assert torch.equal(table[0, :, 0], table[3, :, 0])  # the first half is of the column
    assert torch.equal(table[:, 0, 1], table[:, 5, 1])
    rows = table.view(24, 16)
    assert torch.cdist(rows, rows).fill_diagonal_(9).min() > 0.1
    expected = torch.tensor([2.0, 0.02]).sin()
    assert torch.allclose(sincos(1, 3, 8)[2, :2], expected)


@every_conditioning
def test_a_new_network_answers_zero(conditioning):
    network = DiT(3, 6, 8, width=WIDTH, depth=2, heads=2, conditioning=conditioning)
    out = network(*batch())
    assert out.shape == (2, 6, 8, 8)
    assert not out.any()


def test_adaln_zero_begins_as_the_identity():
    network = DiT(3, 3, 8, width=WIDTH, depth=3, heads=2)
    x = torch.randn(2, 16, WIDTH)
    told = network.modulation(torch.randn(2, WIDTH))
    assert torch.equal(network.blocks[1](x, told[6:12], None, None), x)


@every_conditioning
@every_position
@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_parameter_learns(conditioning, positions, qk_norm):
    network = small(conditioning=conditioning, positions=positions, qk_norm=qk_norm)
    x, time, embedded = batch()
    embedded.vector.requires_grad_()
    network(x, time, embedded).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert embedded.vector.grad.abs().min() > 0


@every_conditioning
@every_position
def test_time_and_condition_are_heard(conditioning, positions):
    network = small(conditioning=conditioning, positions=positions, in_channels=5)
    x, time, embedded = batch()
    vector, image = embedded.vector, torch.randn(2, 2, 8, 8)
    out = network(x, time, Embedded(vector=vector, image=image))
    for other in (
        network(x, time + 0.1, Embedded(vector=vector, image=image)),
        network(x, time, Embedded(vector=vector.flip(1), image=image)),
        network(x, time, Embedded(vector=vector, image=image + 1)),
        network(x, time, Embedded(image=image)),
    ):
        assert (out - other).abs().max() > 1e-3


@every_conditioning
def test_conditions_of_another_width(conditioning):
    network = small(conditioning=conditioning, embedding_dim=12)
    x, time, _ = batch()
    vector = torch.randn(2, 12, requires_grad=True)
    network(x, time, Embedded(vector=vector)).square().mean().backward()
    assert vector.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("conditioning", ["in-context", "cross-attention"])
def test_tokens_are_heard_as_a_set(conditioning):
    network = small(conditioning=conditioning, positions="rotary")
    x, time, embedded = batch()
    tokens = torch.randn(2, 5, WIDTH)
    out = network(x, time, Embedded(vector=embedded.vector, tokens=tokens))
    assert out.shape == x.shape
    assert not torch.allclose(out, network(x, time, embedded), atol=1e-3)
    turned_round = network(x, time, Embedded(vector=embedded.vector, tokens=tokens.flip(1)))
    torch.testing.assert_close(turned_round, out, atol=1e-5, rtol=1e-5)


@every_conditioning
@every_position
def test_an_image_does_not_see_its_batch(conditioning, positions):
    network = small(conditioning=conditioning, positions=positions)
    x, time, embedded = batch(3)
    alone = network(x[1:2], time[1:2], Embedded(vector=embedded.vector[1:2]))
    torch.testing.assert_close(alone, network(x, time, embedded)[1:2], atol=1e-5, rtol=1e-5)


@every_position
def test_positions_matter_and_nothing_else_orders_the_patches(positions):
    network = small(positions=positions)
    x, time, embedded = batch()
    order = torch.randperm(16)

    def shuffled(y):
        return unpatchify(patchify(y, 2)[:, order], 2, 8, 8)

    out = network(x, time, embedded)
    assert not torch.allclose(network(shuffled(x), time, embedded), shuffled(out), atol=1e-3)
    network.positions = network.positions[..., :1, :].expand_as(network.positions)
    out = network(x, time, embedded)
    torch.testing.assert_close(network(shuffled(x), time, embedded), shuffled(out))


def test_rotary_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16).double()
    place = torch.tensor([[0, 0], [2, 5], [3, 1], [5, 6], [3, 5]])
    turn = turns(place, 16).double()
    q, k = turned(q, turn)[0, 0], turned(k, turn)[0, 0]  # (5, 16) each
    assert torch.allclose(q[0] @ k[1], q[2] @ k[3])  # both (2, 5) away
    assert not torch.allclose(q[0] @ k[1], q[2] @ k[4])


@pytest.mark.parametrize("shape", [(8, 16), (12, 4)])
@every_position
def test_other_sizes_than_the_trained_one(shape, positions):
    network = small(positions=positions)
    assert network(torch.randn(1, 3, *shape), torch.rand(1)).shape == (1, 3, *shape)


def test_bfloat16_agrees_with_float32():
    network = small(qk_norm=True, positions="rotary")
    x, time, embedded = batch(4)

    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = network(x, time, embedded).float()
        gradients = torch.autograd.grad(out.square().mean(), list(network.parameters()))
        return out, torch.cat([g.flatten() for g in gradients])

    (expected, exact), (rounded, gradients) = run(False), run(True)
    assert (rounded - expected).norm() < 0.02 * expected.norm()
    assert F.cosine_similarity(gradients, exact, dim=0) > 0.995


def test_what_does_not_fit_is_explained():
    with pytest.raises(ValueError, match="'adaln-one' is not one of in-context, cross-attention"):
        small(conditioning="adaln-one")
    with pytest.raises(ValueError, match="'learned' is not one of sincos, rotary"):
        small(positions="learned")
    with pytest.raises(ValueError, match="width 36 must be a multiple of 4 times the 2 heads"):
        small(width=36)
    with pytest.raises(ValueError, match="9x8 .* multiples of 2"):
        small()(torch.randn(1, 3, 9, 8), torch.rand(1))
    with pytest.raises(ValueError, match=r"vectors of shape \(1, 8\).*expected \(B, 32\)"):
        small()(torch.randn(1, 3, 8, 8), torch.rand(1), Embedded(vector=torch.randn(1, 8)))
    with pytest.raises(ValueError, match="no tokens; use in-context, cross-attention or"):
        tokens = torch.randn(1, 3, WIDTH)
        small()(torch.randn(1, 3, 8, 8), torch.rand(1), Embedded(tokens=tokens))


# Peebles & Xie 2023, table 4; the multiply-adds of one picture, in billions.
@pytest.mark.parametrize(
    "depth, width, heads, published",
    [
        (12, 384, 6, {2: 6.06, 4: 1.41, 8: 0.36}),
        (12, 768, 12, {2: 23.01, 4: 5.56, 8: 1.42}),
        (24, 1024, 16, {2: 80.71, 4: 19.70, 8: 5.01}),
        (28, 1152, 16, {2: 118.64, 4: 29.05, 8: 7.39}),
    ],
)
def test_operations_are_those_of_the_paper(depth, width, heads, published):
    for patch, expected in published.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network = DiT(4, 8, 32, patch, width, depth, heads)
            vector = Embedded(vector=torch.randn(1, width))
            network(torch.randn(1, 4, 32, 32), torch.rand(1), vector)
        assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=0.02)


def test_cross_attention_costs_more_operations_than_adaln():
    counts = {}
    for conditioning in THE_PAPERS:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network = DiT(4, 8, 32, 2, 1152, 28, 16, conditioning=conditioning)
            vector = Embedded(vector=torch.randn(1, 1152))
            network(torch.randn(1, 4, 32, 32), torch.rand(1), vector)
        counts[conditioning] = counter.get_total_flops()
    assert counts["in-context"] == pytest.approx(counts["adaln"], rel=0.02)
    assert counts["adaln-zero"] == pytest.approx(counts["adaln"], rel=0.01)
    assert 1.1 < counts["cross-attention"] / counts["adaln"] < 1.2  # the paper: about 15% more


@pytest.mark.slow
def test_parity_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    ours = small()
    own, state = ours.state_dict(), {}
    modulation = {p: own[f"modulation.linear.{p}"].split(WIDTH) for p in ("weight", "bias")}
    fold = torch.arange(12).view(3, 4).T.flatten()  # theirs has the channels of a pixel together
    for p in ("weight", "bias"):
        state[f"pos_embed.proj.{p}"] = own[f"enter.{p}"]
        state[f"proj_out_1.{p}"] = torch.cat(modulation[p][-2:])
        state[f"proj_out_2.{p}"] = own[f"leave.{p}"][fold]
        for i in range(2):
            block = f"transformer_blocks.{i}"
            shift1, scale1, shift2, scale2, gate1, gate2 = modulation[p][6 * i : 6 * (i + 1)]
            six = torch.cat([shift1, scale1, gate1, shift2, scale2, gate2])
            state[f"{block}.norm1.linear.{p}"] = six
            thirds = own[f"blocks.{i}.attention.qkv.{p}"].chunk(3)
            for key, third in zip("qkv", thirds, strict=True):
                state[f"{block}.attn1.to_{key}.{p}"] = third
            state[f"{block}.attn1.to_out.0.{p}"] = own[f"blocks.{i}.attention.out.{p}"]
            state[f"{block}.ff.net.0.proj.{p}"] = own[f"blocks.{i}.up.{p}"]
            state[f"{block}.ff.net.2.{p}"] = own[f"blocks.{i}.down.{p}"]
            embedder = f"{block}.norm1.emb.timestep_embedder"
            state[f"{embedder}.linear_1.{p}"] = own[f"time.up.{p}"]
            state[f"{embedder}.linear_2.{p}"] = own[f"time.down.{p}"]
    labels = torch.randn(11, WIDTH)
    for i in range(2):
        emb = theirs.transformer_blocks[i].norm1.emb
        emb.time_proj.downscale_freq_shift = 0  # the paper's frequencies, as ours
        state[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = labels
    state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"].view(WIDTH, 3, 2, 2)
    theirs.load_state_dict(state)
    x, label, step = torch.randn(2, 3, 8, 8), torch.tensor([3, 10]), torch.tensor([0, 750])
    expected = theirs(x, step, label).sample
    assert expected.std() > 0.1
    out = ours(x, step / 1000, Embedded(vector=labels[label]))
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
