"""Consistency models, progressive distillation, reflow, and the command that makes students."""

import math
import shutil

import pytest
import torch
from torch import nn

import tiny
from gaussian import COVARIANCE, MEAN, SCHEDULES, flow
from gaussian import exact as exact_denoiser
from trilemma import checkpoint, recipe, sampling, stepping, training
from trilemma.batch import Batch, Condition, Rng
from trilemma.codecs import Pixels
from trilemma.data import batches
from trilemma.data import load as load_data
from trilemma.diffusion import grids, solvers
from trilemma.diffusion.schedules import Linear, Straight
from trilemma.diffusion.targets import TARGETS
from trilemma.distilling import METHODS, distill, student
from trilemma.errors import Interrupted, UserError
from trilemma.model import Frozen
from trilemma.models.consistency import Adversarial, Consistency, nearer
from trilemma.models.diffusion import Diffusion
from trilemma.models.distillation import Progressive, Reflow, levels

SHAPE = (1, 1, 2)
CRITIC = "model.objective.critic.channels=4"
VALUES, AXES = (part.float() for part in torch.linalg.eigh(COVARIANCE))
MEAN32 = MEAN.float()


class Loose(Pixels):
    """Numbers without bounds, as Gaussians are."""

    bounds = None


class Network(nn.Module):
    """F (straight) of a function x_t, alpha, sigma -> x_0 of numbers (B, 2)."""

    def __init__(self, schedule, function):
        super().__init__()
        self.schedule, self.function = schedule, function
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x, time, embedded):
        alpha, sigma = (v[:, None] for v in self.schedule(time))
        x = x.flatten(1) * (alpha**2 + sigma**2).sqrt()  # the model scaled it
        x0 = self.function(x, alpha, sigma)
        # x_0 = (b x - sigma F) / (b alpha - a sigma) with a = -1, b = 1
        return ((x - (alpha + sigma) * x0) / sigma.clamp(min=1e-6)).view(-1, *SHAPE)


def expected(x, alpha, sigma):
    """The mean of the pictures behind x_t."""
    gain = alpha * VALUES / (alpha**2 * VALUES + sigma**2)
    return MEAN32 + ((x - alpha * MEAN32) @ AXES * gain) @ AXES.T


def mapped(x, alpha, sigma):
    """Where the flow takes x_t: the consistency function."""
    gain = (VALUES / (alpha**2 * VALUES + sigma**2)).sqrt()
    return MEAN32 + ((x - alpha * MEAN32) @ AXES * gain) @ AXES.T


def model(function, schedule=None, objective=None):
    schedule = schedule or Straight()
    network = Network(schedule, function)
    return Diffusion(
        Loose(SHAPE), network, None, schedule, target="straight", objective=objective
    ).eval()


def batch(n=64, seen=0):
    rng = Rng(range(n))
    image = MEAN32 + (Rng(range(n, 2 * n)).normal(2) * VALUES.sqrt()) @ AXES.T
    return Batch(image.view(-1, *SHAPE), Condition(n), seen, rng)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("target", [name for name in TARGETS if name != "image"])
def test_a_consistency_function_gives_back_what_has_no_noise(name, target):
    if name in ("zero-terminal", "straight") and target == "noise":
        pytest.skip("refused: nothing is left of the picture at t = 1")
    schedule = SCHEDULES[name]

    class Any(nn.Module):
        def forward(self, x, time, embedded):
            return torch.full_like(x, 7.0)

    made = Diffusion(Pixels(SHAPE), Any(), None, schedule, target=target)
    x = torch.tensor([[0.3, -0.8], [1.0, 0.0]]).view(2, *SHAPE)
    given = made.conditioner(Condition(2))
    torch.testing.assert_close(made.denoise(x, 0.0, given), x)
    torch.testing.assert_close(made.denoise(x, torch.zeros(2), given), x)


def test_the_target_image_is_refused():
    made = Diffusion(Pixels(SHAPE), nn.Linear(2, 2), target="image", objective=Consistency())
    with pytest.raises(ValueError, match="must give it back; use straight"):
        made.phases()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_nearer_point_has_a_share_less_of_noise(name):
    schedule = SCHEDULES[name]
    t = torch.tensor([0.05, 0.3, 0.6, 0.99])
    for gap in (0.01, 0.5, 1.0):
        r = nearer(schedule, t, gap)
        share, less = (
            sigma / (alpha + sigma) for alpha, sigma in (schedule(each.double()) for each in (t, r))
        )
        torch.testing.assert_close(less, (1 - gap) * share, rtol=1e-3, atol=1e-6)


def test_the_gap_begins_at_denoising_and_falls_with_the_images_seen():
    objective = Consistency(halving=100, smallest=0.1)
    assert [objective.gap(seen) for seen in (0, 100, 300, 10**6)] == [1, 0.5, 0.25, 0.1]
    with pytest.raises(ValueError, match="smallest <= gap"):
        Consistency(gap=0.001)


@pytest.mark.parametrize("name", ["straight", "linear", "ve", "vp"])
def test_distillation_has_the_known_map_for_its_answer(name):
    """On Gaussian data with an exact teacher: no loss is left, but for the step's error."""
    schedule = SCHEDULES[name]
    losses = {}
    for gap in (0.1, 0.01):
        objective = Consistency(Frozen(model(expected, schedule)), gap=gap, smallest=1e-4, huber=0)
        objective.times = lambda rng, schedule: 0.05 + 0.9 * rng.uniform()
        known = objective.loss(model(mapped, schedule), batch())["loss"].item()
        other = objective.loss(model(expected, schedule), batch())["loss"].item()
        losses[gap] = known / other
    assert losses[0.01] < 0.25 * losses[0.1], losses  # of a first-order step: as the gap
    assert losses[0.01] < 0.02


def test_the_first_loss_without_a_teacher_is_denoising():
    objective = Consistency(huber=1e-4)
    student = model(mapped, objective=objective)
    given = batch()
    rng = given.rng[:]
    t = objective.times(rng, student.schedule)
    noise = rng.normal(*SHAPE)
    alpha, sigma = levels(student, t, noise)
    x = alpha * given.image + sigma * noise
    guess = student.denoise(x, t, student.conditioner(given.condition))
    size = ((guess - given.image) * (alpha + sigma) / sigma).flatten(1).square().mean(1).sqrt()
    assert objective.loss(student, given)["loss"].item() == pytest.approx(
        size.mean().item(), abs=2e-4
    )


@pytest.mark.parametrize("name", ["straight", "linear", "ve"])
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_the_consistency_solver_draws_the_data_by_the_known_map(name, calls):
    schedule, n = SCHEDULES[name], 8000
    _, sigma = schedule(torch.ones(1))
    x = sigma * Rng(range(n)).normal(2)

    def function(x, t):
        alpha, sigma = schedule(torch.tensor(t))
        return mapped(x, alpha, sigma)

    times = solvers.SOLVERS["consistency"].grid(schedule, calls)
    *_, last = solvers.SOLVERS["consistency"].steps(
        function, x, times, schedule, Rng(range(n, 2 * n))
    )
    torch.testing.assert_close(last.mean(0), MEAN32, rtol=0, atol=0.025)
    torch.testing.assert_close(last.T.cov(), COVARIANCE.float(), rtol=0, atol=0.025)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_progressive_target_ends_where_two_ddim_steps_do(name, steps):
    schedule = SCHEDULES[name]
    objective = Progressive(Frozen(model(expected, schedule)), steps)
    times = grids.even_share(schedule, 2 * steps)
    x = Rng(range(5)).normal(*SHAPE)
    for i in range(steps):
        path = times[2 * i : 2 * i + 3]
        each = tuple(t.float().expand(5) for t in path)
        x0 = objective.two_steps(objective.taught, x, each, Condition(5))
        two, one = (
            list(solvers.SOLVERS["ddim"].steps(denoise, x.double(), grid, schedule, None))[-1]
            for denoise, grid in (
                (lambda x, t: exact_denoiser(schedule)(x.flatten(1), t).view(-1, *SHAPE), path),
                (lambda x, t, x0=x0: x0.double(), path[[0, 2]]),
            )
        )
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_progressive_learns_nothing_more_from_a_teacher_it_equals_in_straight_paths():
    """Of one point the flow is straight: one step is two."""
    point = torch.tensor([0.2, -0.5])

    def single(x, alpha, sigma):
        return point.expand_as(x)

    objective = Progressive(Frozen(model(single)), 2)
    assert objective.loss(model(single), batch())["loss"].item() < 1e-8


@pytest.mark.parametrize("name", ["straight", "linear", "ve"])
def test_pairs_lie_on_the_teachers_flow(name):
    schedule = SCHEDULES[name]
    objective = Reflow(Frozen(model(expected, schedule)), solver="heun", solver_steps=40)
    noise, x0 = objective.pairs(Condition(64), Rng(range(64)))
    _, sigma = schedule(torch.ones(1, dtype=torch.float64))
    ends = flow(schedule, sigma * noise.flatten(1).double())
    torch.testing.assert_close(x0.flatten(1).double(), ends, rtol=0, atol=5e-3)


def test_reflow_learns_the_line_of_a_pair():
    objective = Reflow(Frozen(model(expected, Linear())), steps=1, solver_steps=20)
    first = objective.loss(model(mapped), batch())["loss"]
    assert first.item() < 1e-2  # in one step from t = 1, where alpha is almost 0 in the teacher's
    assert objective.loss(model(expected), batch())["loss"] > 5 * first


def test_a_solver_that_draws_noise_makes_no_pairs():
    with pytest.raises(ValueError, match="draws fresh noise on its way.*dpmpp_2m or heun"):
        Reflow(Frozen(model(expected)), solver="ddpm")
    with pytest.raises(ValueError, match="not known"):
        Reflow(Frozen(model(expected)), solver="eulr")


def test_a_teacher_of_another_schedule_or_kind_is_refused():
    student = model(expected, Straight(), Progressive(Frozen(model(expected, Linear())), 2))
    with pytest.raises(ValueError, match=r"another Linear.*\[model.schedule\]"):
        student.phases()
    with pytest.raises(ValueError, match="is a trained Linear; a student learns from a diffusion"):
        Consistency(Frozen(nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="steps is 0"):
        Progressive(Frozen(model(expected)), 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_data(tiny.pictures(tmp_path_factory.mktemp("pictures")), split="all")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    training.train(
        "quick-diffusion", data, out=out, steps=3, seed=1, quiet=True,
        overrides=tiny.overrides("quick-diffusion"),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_student_is_a_run_like_any_other(method, data, teacher, tmp_path):
    out = tmp_path / "student"
    made = distill(teacher, 2, method=method, data=data, out=out, images=72, quiet=True)
    assert made.name == f"quick-diffusion-{method}-2"
    assert made.progress["seen"] >= (24 if method == "progressive" else 72)
    shutil.rmtree(out / "training")
    tensors, facts = checkpoint.read_model(out)
    assert "objective" not in facts["recipe"]["model"]
    assert not any(name.startswith("objective") for name in tensors)
    loaded = sampling.load(out)
    assert loaded.options({})["steps"] == 2 and loaded.options({}).get("guidance", 1.0) == 1.0
    assert torch.equal(loaded.sample(4, seed=3), made.sample(4, seed=3))
    if method == "progressive":
        assert sorted(p.name for p in (out / "halvings").iterdir()) == ["4", "8"]
        last = recipe.load(out / "recipe.toml")["model"]["objective"]
        assert last["steps"] == 2 and last["guidance"] == 1.0
        assert last["teacher"]["path"] == str(out / "halvings" / "4")
    with pytest.raises(ValueError, match="conditioner.dropout above 0"):
        loaded.sample(1, guidance=3.0)


def adversarial(student_knows, critic, steps=2, **more):
    objective = Adversarial(Frozen(model(expected)), critic, steps, **more)
    return objective, model(student_knows, objective=objective)


class Scores(nn.Module):
    """A critic by a function of pictures (B, 2)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, image, label):
        return self.function(image.flatten(1))


def test_a_critic_that_knows_nothing_leaves_the_losses_of_the_equilibrium():
    objective, student = adversarial(mapped, Scores(lambda x: 0 * x.sum(1)))
    told = objective.critic_loss(student, batch())
    assert told["loss"].item() == pytest.approx(math.log(2))
    assert told["penalty"] == 0 and told["ahead"] == 0
    losses = objective.loss(student, batch())
    assert losses["unreal"].item() == pytest.approx(math.log(2))
    total = losses["distance"] + objective.weight * losses["unreal"]
    assert losses["loss"].item() == pytest.approx(total.item())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_known_map_leaves_a_critic_nothing_to_tell(steps):
    """At the times of sampling it draws the data's distribution, so at any of them no score can."""
    objective, student = adversarial(mapped, Scores(lambda x: x[:, 0]), steps)
    _, drawn, _ = objective.pair(student, batch(8000))
    torch.testing.assert_close(drawn.flatten(1).mean(0), MEAN32, rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.flatten(1).T.cov(), COVARIANCE.float(), rtol=0, atol=0.03)
    _, student = adversarial(expected, Scores(lambda x: x[:, 0]), steps)
    _, mean, _ = objective.pair(student, batch(8000))
    assert (mean.flatten(1).T.cov().diag() < 0.9 * COVARIANCE.float().diag()).all()


def test_the_critic_looks_at_the_times_of_sampling_within_bounds():
    objective, student = adversarial(mapped, Scores(lambda x: x[:, 0]), steps=2)
    seen = []
    denoise = student.denoise
    student.denoise = lambda x, t, embedded: seen.append(t) or denoise(x, t, embedded)
    objective.pair(student, batch())
    assert set(seen[0].tolist()) == {1.0, 0.5}
    student.codec.bounds = (-0.1, 0.1)
    _, drawn, _ = objective.pair(student, batch())
    assert drawn.abs().max() <= 0.1


def test_the_penalty_is_on_real_and_drawn_pictures():
    objective, student = adversarial(mapped, Scores(lambda x: 3 * x[:, 0]))
    steep = objective.critic_loss(student, batch(4000))["penalty"].item()
    assert steep == pytest.approx(2 * 3**2, rel=0.1)  # of a quarter of them, at four times the size


def test_the_critic_and_the_student_learn_apart(data, teacher, tmp_path):
    made = student(sampling.load(teacher), teacher, "adversarial", 2, 1.5)
    spec = recipe.override(recipe.resolve(made, training.facts(data)), [CRITIC])
    model = recipe.build(spec["model"])
    names = [phase.name for phase in model.phases()]
    assert names == ["critic", "student"]
    own = [{p for m in phase.modules for p in m.parameters()} for phase in model.phases()]
    assert not own[0] & own[1]
    assert own[0] | own[1] == {p for p in model.parameters() if p.requires_grad}
    given = next(batches(data, 8, seed=0, start=0))
    for phase, moved, still in zip(model.phases(), own, own[::-1], strict=True):
        with stepping.only_these_learn(model, phase.modules, {"a": 0, "b": 0}):
            phase.loss(given)["loss"].backward()
        assert any(p.grad is not None for p in moved)
        assert not any(p.grad is not None for p in still)
        model.zero_grad(set_to_none=True)
    rates = made["train"]
    assert rates["optimizer"]["lr"] == 2e-3 and rates["optimizer"]["type"] == "adam"
    assert rates["phases"]["student"]["lr"] == 2e-3  # a quarter of the teacher's
    assert rates["phases"]["student"]["type"] == "muon"


def test_a_student_begins_with_its_teachers_weights(data, teacher, tmp_path):
    still = ("train.optimizer={type='adam',lr=0.0}",)
    distill(
        teacher, 1, method="consistency", data=data, out=tmp_path / "s", images=8, overrides=still,
        quiet=True,
    )  # fmt: skip
    own, theirs = checkpoint.read_model(tmp_path / "s")[0], checkpoint.read_model(teacher)[0]
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_a_student_goes_on_bit_for_bit_when_the_teacher_is_gone(data, teacher, tmp_path):
    theirs = tmp_path / "teacher"
    shutil.copytree(teacher, theirs)

    def stop(trained, elapsed):
        raise Interrupted("as by Ctrl-C")

    def run(out, **more):
        name = tmp_path / "whole" / "quick-diffusion-adversarial-1.toml"
        return training.train(
            name, data, out=out, images=48, quiet=True, overrides=["train.save_every=0"], **more
        )

    distill(theirs, 1, data=data, out=tmp_path / "whole", images=8, quiet=True)
    whole = run(tmp_path / "a")
    with pytest.raises(Interrupted):
        run(tmp_path / "b", probe=stop, probes=2)
    shutil.rmtree(theirs)
    parts = run(tmp_path / "b", resume=True)
    one, two = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_student_of_the_noise_predicts_the_straight_target(data, tmp_path):
    small = [*tiny.overrides("score-vp"), "train.batch=4"]
    out = tmp_path / "vp"
    training.train("score-vp", data, out=out, steps=1, quiet=True, overrides=small)
    made = distill(out, 1, data=data, out=tmp_path / "s", images=8, quiet=True)
    assert made.recipe["model"]["target"] == "straight"
    assert not made.model.dequantise
    assert math.isfinite(made.sample(2).float().mean())


def test_a_student_of_latents_needs_no_first_stage_but_its_teachers(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {name: tiny.overrides(name) for name in ("kl-f4", "latent-diffusion")}
    training.train("kl-f4", data, out="runs/kl-f4", steps=1, quiet=True, overrides=changes["kl-f4"])
    training.train(
        "latent-diffusion", data, out="latent", steps=1, quiet=True,
        overrides=changes["latent-diffusion"],
    )  # fmt: skip
    shutil.rmtree("runs/kl-f4")
    with pytest.raises(UserError, match="4 x 4.*too small.*--method consistency"):
        distill("latent", 1, data=data, out="s", images=8, quiet=True)
    distill("latent", 1, method="consistency", data=data, out="s", images=8, quiet=True)
    own, theirs = checkpoint.read_model("s")[0], checkpoint.read_model("latent")[0]
    codec = [name for name in theirs if name.startswith("codec.")]
    assert codec and all(torch.equal(own[name], theirs[name]) for name in codec)
    assert sampling.load("s").sample(2).shape == (2, *data.shape)


@pytest.mark.parametrize(("name", "out"), [(".", "../teacher"), ("emoji", "emoji")])
def test_a_teacher_is_named_by_where_it_is(name, out, data, teacher, tmp_path, monkeypatch):
    shutil.copytree(teacher, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path / "teacher")
    monkeypatch.setattr(checkpoint, "PACKAGED", tmp_path / "packaged")
    packaged = tmp_path / "packaged" / "emoji.safetensors"
    packaged.parent.mkdir()
    shutil.copy(teacher / "model.safetensors", packaged)
    made = distill(name, 1, data=data, images=8, quiet=True)
    assert made.path.resolve() == (tmp_path / "teacher" / f"{out}-adversarial-1").resolve()


@pytest.mark.parametrize("to,method", [(3, "adversarial"), (4, "progressive")])
def test_the_default_is_the_better_method_for_so_many_steps(to, method, data, teacher, tmp_path):
    made = distill(teacher, to, data=data, out=tmp_path / "out", images=8, quiet=True)
    assert made.name == f"quick-diffusion-{method}-{to}"


def test_what_cannot_be_distilled_is_named(data, teacher, tmp_path):
    with pytest.raises(UserError, match="--to is 0.*at least 1 step"):
        distill(teacher, 0)
    with pytest.raises(UserError, match="--to is 1000000.*at most 64"):
        distill(teacher, 1_000_000)
    with pytest.raises(UserError, match="train on 0 images"):
        distill(teacher, 1, data=data, images=0)
    others = tiny.pictures(tmp_path / "others", classes=2)
    with pytest.raises(UserError, match="has the classes class0, class1 and .* class0, class1, cl"):
        distill(teacher, 1, data=others, images=8)
    with pytest.raises(UserError, match="guidance is nan"):
        distill(teacher, 1, guidance=float("nan"))
    with pytest.raises(UserError, match="no method 'magic'; expected one of adversarial"):
        distill(teacher, 1, method="magic")
    small = tiny.overrides("ae")
    training.train("ae", data, out=tmp_path / "ae", steps=1, quiet=True, overrides=small)
    with pytest.raises(UserError, match="is a ae, whose AE takes no steps.*a diffusion model"):
        distill(tmp_path / "ae", 1, data=data)
    with pytest.raises(UserError, match="nowhere"):
        distill(tmp_path / "nowhere", 1)
    out = tmp_path / "student"
    distill(teacher, 1, data=data, out=out, images=8, quiet=True)
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        distill(teacher, 1, data=data, out=out, images=8, quiet=True)
    with pytest.raises(UserError, match="begun as another student.*another --out"):
        distill(teacher, 2, data=data, out=out, images=8, resume=True, quiet=True)
    again = distill(teacher, 1, data=data, out=out, images=16, resume=True, quiet=True)
    assert again.progress["seen"] == 16
    with pytest.raises(UserError, match="is a consistency model, which knows pictures and no path"):
        distill(out, 1, data=data)
    with pytest.raises(UserError, match="conditioner.dropout above 0; use guidance 1"):
        shutil.copytree(teacher, tmp_path / "deaf")
        tensors, facts = checkpoint.read_model(teacher)
        facts["recipe"]["model"]["conditioner"]["dropout"] = 0.0
        checkpoint.write(tmp_path / "deaf" / "model.safetensors", tensors, facts)
        distill(tmp_path / "deaf", 1, guidance=2.0, data=data)
