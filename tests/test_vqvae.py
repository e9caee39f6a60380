"""VQ-VAE: nearest codes, straight-through gradients, running means and restarts, the prior."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import tiny
from trilemma import checkpoint
from trilemma.batch import Batch, Condition, Rng
from trilemma.models.vqvae import VQVAE
from trilemma.networks.convnet import GridDecoder, GridEncoder

SHAPE = (1, 8, 8)


class Blocks(nn.Module):
    """The identity between images and grids: each vector is a block of 4 x 4 pixels."""

    latent, grid = 16, (2, 2)

    def forward(self, image):
        return nn.functional.pixel_unshuffle(image, 4)


class Unblocks(nn.Module):
    def forward(self, latent):
        return nn.functional.pixel_shuffle(latent, 4)


def blocks(codebook_size=8, **options):
    torch.manual_seed(0)
    return VQVAE(Blocks(), Unblocks(), codebook_size, **options).train()


def make(codebook_size=8, **options):
    torch.manual_seed(0)
    encoder, decoder = GridEncoder(SHAPE, 4, channels=8), GridDecoder(SHAPE, 4, channels=8)
    return VQVAE(encoder, decoder, codebook_size, **options)


def batch(count=6, seen=0):
    """Random pictures; `seen` far along for running means with their full half-life."""
    rng = Rng(range(seen, seen + count))
    return Batch(rng.uniform(*SHAPE) * 2 - 1, Condition(count), seen, rng)


def train(model, image, steps, rate=3e-3):
    (phase,) = model.phases()
    optimizer = torch.optim.Adam([p for m in phase.modules for p in m.parameters()], rate)
    for step in range(steps):
        seen = len(image) * step
        rng = Rng(range(seen, seen + len(image)))
        optimizer.zero_grad()
        losses = phase.loss(Batch(image, Condition(len(image)), seen, rng))
        losses["loss"].backward()
        optimizer.step()
        phase.after()
    return losses


def quadrants(count=32):
    """Pictures whose four quadrants are each of one of three tones; the first follows the image."""
    tone = torch.tensor([-0.8, 0.0, 0.8])
    digits = torch.arange(count)[:, None] // torch.tensor([1, 3, 9, 27]) % 3
    return nn.functional.interpolate(tone[digits].view(count, 1, 2, 2), scale_factor=4.0)


def test_codes_are_the_nearest_vectors():
    model = make().eval()
    image = batch().image
    with torch.no_grad():
        z = model.encoder(image)
        distance = (z[:, None] - model.quantiser.codebook[None, :, :, None, None]).square().sum(2)
        codes = model.codes(image)
        assert codes.dtype == torch.int64 and codes.shape == (6, *model.code_shape)
        assert torch.equal(codes, distance.argmin(1))
        assert torch.equal(model.encode(image), model.quantiser.codebook[codes].permute(0, 3, 1, 2))


def test_the_gradient_of_the_decoder_passes_straight_through():
    model, data = make(commitment=0.0), batch()
    z = model.encoder(data.image).detach().requires_grad_()
    quantised = model.quantiser.vectors(model.quantiser.nearest(z))
    (direct,) = torch.autograd.grad(
        nn.functional.mse_loss(model.decoder(quantised), data.image),
        model.decoder.layers[0].weight,
    )
    quantised.requires_grad_()
    error = nn.functional.mse_loss(model.decoder(quantised), data.image)
    (at_codes,) = torch.autograd.grad(error, quantised)

    class Given(nn.Module):
        def forward(self, image):
            return z

    model.encoder = Given()
    model.loss(data)["loss"].backward()
    assert torch.allclose(z.grad, at_codes, atol=1e-8)
    assert torch.allclose(model.decoder.layers[0].weight.grad, direct, atol=1e-6)


def test_commitment_pulls_the_encoder_alone():
    model = blocks(commitment=0.5)
    data = batch()
    losses = model.loss(data)
    z = model.encoder(data.image)
    expected = (z - model.quantiser.vectors(model.quantiser.nearest(z))).square().mean()
    assert losses["distance"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(1.5 * expected.item(), rel=1e-5)
    assert not model.quantiser.codebook.requires_grad


def test_codes_move_to_the_mean_of_their_vectors():
    """One half-life moves N and m half the way; many steps on one batch reach k-means."""
    data = batch(32, seen=10_000)
    model = blocks(halflife=32)
    model.loss(data), model.quantiser.update()
    quantiser = copy.deepcopy(model.quantiser)
    share, moment, before = quantiser.share, quantiser.moment, quantiser.codebook
    vectors = model.encoder(data.image).movedim(1, -1).flatten(0, 2)
    code = model.codes(data.image).flatten()
    model.loss(data), model.quantiser.update()
    for k in range(8):
        mine = vectors[code == k]
        n = 0.5 * share[k] + 0.5 * len(mine) / len(vectors)
        m = 0.5 * moment[k] + 0.5 * mine.sum(0) / len(vectors)
        assert torch.allclose(model.quantiser.codebook[k], m / n, atol=1e-5)
    assert not torch.equal(model.quantiser.codebook, before)
    for _ in range(300):
        model.loss(data), model.quantiser.update()
    code = model.codes(data.image).flatten()
    means = torch.stack([vectors[code == k].mean(0) for k in range(8)])
    assert torch.allclose(model.quantiser.codebook, means, atol=1e-3)


def test_the_codebook_begins_at_vectors_of_the_first_batch():
    model, data = blocks(), batch(32)
    model.quantiser.codebook += 100  # far from all: all vectors choose the same one
    model.loss(data), model.quantiser.update()
    vectors = model.encoder(data.image).movedim(1, -1).flatten(0, 2)
    middle = torch.cdist(model.quantiser.codebook, vectors.mean(0, keepdim=True)).argmin()
    model.quantiser.codebook[middle] = vectors[0]
    nearest = torch.cdist(model.quantiser.codebook, vectors).min(1)
    assert nearest.values.max() < 5e-3
    assert len(set(nearest.indices.tolist())) >= 7


def test_dead_codes_are_restarted_and_others_left():
    model, data = blocks(codebook_size=4, halflife=20, restart=0.1), batch(32, seen=10_000)
    for _ in range(20):
        model.loss(data), model.quantiser.update()
    model.quantiser.codebook[3] = 50.0  # none will choose it
    model.quantiser.moment[3] = model.quantiser.share[3] * 50.0
    for _ in range(50):
        model.loss(data), model.quantiser.update()
    assert model.quantiser.codebook[3].abs().max() <= 1
    assert (model.codes(data.image).flatten().bincount(minlength=4) > 0).all()
    used = model.quantiser.codebook[:3].clone()
    model.loss(data), model.quantiser.update()
    assert torch.allclose(model.quantiser.codebook[:3], used, atol=0.05)


def test_fewer_vectors_than_codes_fill_the_codebook_batch_by_batch():
    model = blocks(codebook_size=20)
    first = model.quantiser.codebook.clone()
    model.loss(batch(2)), model.quantiser.update()  # 8 vectors
    assert (model.quantiser.codebook != first).any(1).sum() <= 16  # 8 restarted, at most 8 chosen
    for seen in range(2, 12, 2):
        model.loss(batch(2, seen)), model.quantiser.update()
    assert (model.quantiser.codebook != first).any(1).all()
    assert model.quantiser.codebook.isfinite().all()


def test_the_codebook_does_not_depend_on_how_the_batch_is_split():
    whole, parts = make(), make()
    for seen in (0, 12):
        whole.loss(batch(12, seen))
        losses = [parts.loss(part)["loss"] for part in batch(12, seen).split(3)]
        whole.quantiser.update(), parts.quantiser.update()
    assert torch.stack(losses).mean().isfinite()
    for name, buffer in whole.named_buffers():
        assert torch.allclose(buffer, parts.get_buffer(name), atol=1e-5), name


def test_a_step_that_was_skipped_leaves_nothing_behind():
    one, other = make(), make()
    broken = batch(4)
    broken.image[0] = float("nan")
    one.loss(broken)  # not finite: the loop takes no step and calls nothing after it
    for model in (one, other):
        model.loss(batch(4, seen=4)), model.quantiser.update()
    assert torch.equal(one.quantiser.codebook, other.quantiser.codebook)


def test_loss_leaves_torchs_generator_alone():
    model = make()
    before = torch.random.get_rng_state()
    model.loss(batch()), model.quantiser.update()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_learns_tells_its_use_and_codes_are_stable():
    model, image = make(), quadrants()
    losses = train(model, image, 300)
    model.eval()
    with torch.no_grad():
        codes = model.codes(image)
        restored = model.from_codes(codes)
        assert (restored - image).abs().mean() < 0.05
        assert (model.codes(restored) == codes).float().mean() > 0.9
        assert torch.equal(model.decode(model.encode(image)), restored)
    assert 2 < losses["perplexity"] <= 8
    assert 0.25 < losses["codes_used"] <= 1


def test_perplexity_is_the_number_of_codes_used_alike():
    model = blocks(codebook_size=4)
    model.quantiser.frequency[:, :, :2] = 1.0
    losses = model.loss(batch())
    assert losses["perplexity"].item() == pytest.approx(2, rel=1e-5)
    assert losses["codes_used"].item() == 0.5


def test_samples_have_the_frequencies_of_the_codes_at_each_place():
    model = blocks(codebook_size=3).eval()
    model.quantiser.codebook[:] = torch.tensor([-0.5, 0.0, 0.5])[:, None]
    model.quantiser.frequency[0, 0] = torch.tensor([0.2, 0.8, 0.0])
    model.quantiser.frequency[0, 1] = torch.tensor([0.0, 0.0, 0.3])  # need not sum to 1
    model.quantiser.frequency[1, 0] = torch.tensor([1.0, 1.0, 1.0])
    model.quantiser.frequency[1, 1] = torch.tensor([0.0, 1.0, 0.0])
    count = 6000
    codes = model.codes(model.sample(Condition(count), Rng(range(count))))
    for place, expected in [((0, 0), [0.2, 0.8, 0]), ((0, 1), [0, 0, 1]), ((1, 1), [0, 1, 0])]:
        found = codes[:, *place].bincount(minlength=3) / count
        assert torch.allclose(found, torch.tensor(expected).float(), atol=0.02)
    both = (codes[:, 0, 0] == 0) & (codes[:, 1, 0] == 0)
    assert both.float().mean().item() == pytest.approx(0.2 / 3, abs=0.01)  # apart from each other
    cold = model.codes(model.sample(Condition(count), Rng(range(count)), temperature=0.5))
    expected = 0.2**2 / (0.2**2 + 0.8**2)
    assert (cold[:, 0, 0] == 0).float().mean().item() == pytest.approx(expected, abs=0.01)


def test_a_picture_depends_on_its_seed_alone():
    model = make().eval()
    train(model, quadrants(), 5)
    with torch.no_grad():
        together = model.sample(Condition(4), Rng([5, 6, 7, 8]))
        alone = model.sample(Condition(1), Rng([7]))
    assert torch.allclose(together[2:3], alone, atol=1e-5)


def test_a_copy_trains_as_the_original():
    """All that training moves is in the weights and buffers: what a checkpoint holds."""
    model, image = make(), quadrants()
    train(model, image, 3)
    other = make()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    train(model, image, 3), train(other, image, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_wrong_codes_latents_and_options_are_told():
    model = make().eval()
    with pytest.raises(ValueError, match=r"codes of shape \(2, 3, 2\).*expected \(B, 2, 2\)"):
        model.from_codes(torch.zeros(2, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes from 0 to 8 were given; the codebook has 0 to 7"):
        model.from_codes(torch.tensor([[[0, 1], [2, 8]]]))
    with pytest.raises(ValueError, match=r"expected \(B, 4, h, w\)"):
        model.decode(torch.zeros(2, 2, 4, 4))
    with pytest.raises(ValueError, match="temperature is 0"):
        model.sample(Condition(1), Rng([0]), temperature=0)
    with pytest.raises(ValueError, match="codebook_size is 1"):
        make(codebook_size=1)
    with pytest.raises(ValueError, match="restart is 0"):
        make(restart=0)
    with pytest.raises(ValueError, match="30 x 28 do not divide by 4.*data.multiple"):
        GridEncoder((1, 30, 28), 4)
    with pytest.raises(ValueError, match="factor is 3"):
        GridDecoder(SHAPE, 4, factor=3)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_grids_are_a_factor_smaller(factor):
    encoder = GridEncoder((3, 16, 24), 5, channels=4, factor=factor)
    decoder = GridDecoder((3, 16, 24), 5, channels=4, factor=factor)
    grid = encoder(torch.zeros(2, 3, 16, 24))
    assert grid.shape == (2, 5, 16 // factor, 24 // factor) == (2, encoder.latent, *encoder.grid)
    assert decoder(grid).shape == (2, 3, 16, 24)


@pytest.mark.slow
def test_two_processes_keep_the_codebook_of_one(tmp_path):
    """Each sees half of every batch, and both move their codebook by all of it.

    Two steps only: these pictures have large plain grounds, so codes are restarted at vectors that
    are alike, and which of two such codes is nearer is soon a matter of rounding.
    """
    folder = str(tiny.pictures(tmp_path / "pictures"))
    sets = [w for change in tiny.overrides("vqvae") for w in ("--set", change)]
    sets += ["--set", "train.precision=fp32"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={tiny.free_port()}", "-m", "trilemma"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name, prefix in (("one", [sys.executable, "-m", "trilemma"]), ("two", torchrun)):
        words = ["train", "vqvae", "--data", folder, "--out", str(tmp_path / name), "--steps", "2"]
        command = [*prefix, *words, "--device", "cpu", *sets]
        subprocess.run(command, check=True, env=environ, capture_output=True)
    one, two = (checkpoint.read(tmp_path / n / "model.safetensors")[0] for n in ("one", "two"))
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-4), key
