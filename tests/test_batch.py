"""The per-image random streams, and what flows in a batch."""

import math

import pytest
import torch

from trilemma.batch import _GOLDEN, Batch, Condition, Rng, _split_mix, to_float, to_uint8


def test_philox_known_answer():
    """The published test vector of Philox4x32-10 for an all-zero counter and key."""
    words = [int(word) & 0xFFFFFFFF for word in Rng([0])._bits(1)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_a_stream_does_not_depend_on_its_batch():
    together, alone = Rng([3, 2**62, 7]), Rng([2**62])
    for _ in range(3):
        assert torch.equal(together.normal(3, 5)[1:2], alone.normal(3, 5))


def test_uniform_numbers_are_the_upper_bits_of_the_words():
    seeds = [5, 2**40 + 3]
    words = torch.stack(Rng(seeds)._bits(3), -1).flatten(1) & 0xFFFFFFFF
    assert torch.equal(Rng(seeds).uniform(10), ((words[:, :10] >> 9).float() + 0.5) * 2.0**-23)


def test_split_mix_known_answer():
    """The published first numbers of SplitMix64 from the state 1234567."""
    states = 1234567 + torch.arange(1, 4) * _GOLDEN
    words = [word % 2**64 for word in _split_mix(states).tolist()]
    assert words == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("shape", [(3, 5), (), (7,), (2, 4, 4)])
def test_many_draws_do_not_depend_on_how_many_are_made_at_once(shape, monkeypatch):
    seeds = [3, 2**62, 7]
    drawn = list(Rng(seeds).normals(6, *shape))
    assert len(drawn) == 6 and drawn[0].shape == (3, *shape)
    monkeypatch.setattr("trilemma.batch.TOGETHER", 3 * 4 * math.prod(shape))  # four at a time
    few, alone = Rng(seeds), Rng(seeds[1:2])
    assert all(torch.equal(*pair) for pair in zip(drawn, few.normals(6, *shape), strict=True))
    for noise, own in zip(drawn, alone.normals(6, *shape), strict=True):
        assert torch.equal(noise[1:2], own)
    assert torch.equal(few.uniform(2)[1:2], alone.uniform(2))


def test_streams_and_calls_differ():
    rng = Rng([0, 1])
    first, second = rng.normal(100), rng.normal(100)
    third, fourth = rng.normals(2, 100)
    (fifth,) = rng.normals(1, 100)
    drawn = torch.cat([first, second, third, fourth, fifth])
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.4


@pytest.mark.parametrize("draw", [Rng.normal, lambda rng, n: next(rng.normals(1, n))])
def test_moments(draw):
    normal = draw(Rng(range(64)), 4096).double()
    assert abs(normal.mean()) < 0.01 and abs(normal.var() - 1) < 0.01
    assert abs((normal**4).mean() - 3) < 0.06
    uniform = Rng(range(64)).uniform(4096).double()
    assert 0 < uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.003 and abs(uniform.var() - 1 / 12) < 0.001


def test_categorical_follows_its_logits():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 20_000, 3)
    drawn = Rng([1]).categorical(logits)[0]
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.02)


def test_integers_cover_their_range():
    drawn = Rng(range(4)).integers(5, 1000)
    assert drawn.min() == 0 and drawn.max() == 4


def test_splitting_keeps_streams_and_conditions():
    rng = Rng(range(4))
    condition = Condition(4, label=torch.arange(4), text=list("abcd"))
    batch = Batch(torch.zeros(4, 1, 2, 2), condition, 0, rng)
    whole = Rng(range(4)).normal(6)
    parts = list(batch.split(2))
    assert torch.equal(torch.cat([part.rng.normal(6) for part in parts]), whole)
    assert parts[1].condition.text == ["c", "d"] and parts[1].condition.count == 2
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        list(batch.split(3))


def test_uint8_round_trip():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert math.isclose(to_float(every).min(), -1) and math.isclose(to_float(every).max(), 1)
