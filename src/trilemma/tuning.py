"""Fit the times that a solver visits to one trained model and one number of network calls.

Few steps should end where many do from the same noise. So the grid is the one whose pictures have
the least squared distance to those of `REFERENCE` steps: a nonlinear least-squares problem in the
logarithms of the gaps between the shares u = sigma / (alpha + sigma), which keeps the times falling
whatever the unknowns are. Levenberg-Marquardt solves it (Marquardt 1963, "An Algorithm for Least-
Squares Estimation of Nonlinear Parameters"), its derivatives by differences: a few tens of drawings
of as many calls as the grid is for. What is minimised follows Sabour, Fidler, Kreis 2024, "Align
Your Steps", in fitting steps to model and solver; distances after whole trajectories, as in Tong et
al. 2024, "Learning to Discretize Denoising Diffusion ODEs", take the place of their bound.

It begins at the best of the named grids. What is told and kept is judged on other noises than those
it was fitted to, so that a tuned grid that is no better than a named one is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilemma import checkpoint, sampling
from trilemma.batch import Condition, Rng
from trilemma.diffusion.grids import GRIDS
from trilemma.diffusion.levels import STRAIGHT, levels
from trilemma.diffusion.schedules import Schedule
from trilemma.diffusion.solvers import SOLVERS
from trilemma.errors import UserError
from trilemma.models.diffusion import SOLVER, Diffusion

REFERENCE = 128  # steps of dpmpp_2m on its own grid
ROUNDS = 8  # of least squares, at most
NUDGE = 0.02  # of a gap's logarithm, for derivatives
ENOUGH = 0.01  # a round that gains less than this share of the squared distance is the last

Draw = Callable[[Tensor], Tensor]
"""Times (steps + 1,) -> pictures (B, ...), always from the same noise."""


def _gaps(schedule: Schedule, times: Tensor) -> Tensor:
    """Return the logarithms (steps,) of the gaps between the shares of noise at `times`."""
    shares = [level.sigma / level.scale(STRAIGHT) for level in levels(schedule, times)]
    return torch.tensor(shares, dtype=torch.float64).diff().neg().log()


def _times(schedule: Schedule, gaps: Tensor, first: float) -> Tensor:
    """Invert `_gaps`, up to a factor of all gaps, for the share of noise `first` at t = 1."""
    shares = first * gaps.softmax(0).flip(0).cumsum(0).flip(0)[1:]  # after the first step
    inner = schedule.time(2 * ((1 - shares) / shares).log())
    return torch.cat([inner.new_ones(1), inner, inner.new_zeros(1)])


def fit(draw: Draw, target: Tensor, schedule: Schedule, times: Tensor) -> Tensor:
    """Return the times near `times` whose drawing is nearest to `target`.

    Args:
        draw: by a solver, at given times.
        target: (B, ...), what should be drawn.
        schedule: of the model.
        times: (steps + 1,) from 1 to 0, to begin at.
    """
    (start,) = levels(schedule, times[:1])
    first = start.sigma / start.scale(STRAIGHT)

    def error(gaps: Tensor) -> Tensor:
        return (draw(_times(schedule, gaps, first)) - target).flatten().double()

    gaps = _gaps(schedule, times)
    residual, damping = error(gaps), 0.1
    for _ in range(ROUNDS):
        nudged = gaps + NUDGE * torch.eye(len(gaps), dtype=torch.float64)
        slopes = torch.stack([(error(each) - residual) / NUDGE for each in nudged])  # (steps, ...)
        square, down = (slopes @ slopes.T).cpu(), -(slopes @ residual).cpu()
        before = residual.square().sum()
        for _ in range(4):
            damped = square + damping * (square.diag() + 1e-9 * square.trace()).diag()
            step = torch.linalg.solve(damped, down).clamp(-1, 1)
            trial = error(gaps + step)
            if trial.square().sum() < before:
                gaps, residual, damping = gaps + step, trial, damping / 5
                break
            damping *= 5
        if residual.square().sum() > (1 - ENOUGH) * before:
            break
    return _times(schedule, gaps, first)


def _distance(drawn: Tensor, target: Tensor) -> float:
    return (drawn - target).double().square().mean().sqrt().item()


def _draw(trained: sampling.Trained, seeds: range, options: dict[str, Any]) -> Tensor:
    """Draw float pictures (n, C, H, W), in float32: differences are too small for less."""
    where = trained.where
    labels = trained.labels(len(seeds), None)
    rng = Rng(seeds, where)
    has = trained.attributes(rng, None)
    told = None if labels is None else labels.to(where)
    condition = Condition(len(seeds), told, has, trained.texts(len(seeds), None))
    with torch.inference_mode():
        return trained.generator.sample(condition, rng, **options)


def tune_steps(
    run: str | Path,
    calls: int = 10,
    *,
    solver: str | None = None,
    n: int = 64,
    seed: int = 0,
    device_name: str | None = None,
) -> dict[str, Any]:
    """Find the times at which a run's model is best sampled with few calls; keep them in it.

    Args:
        run: a run folder or its `model.safetensors`, which the times are written into.
        calls: of the network for each picture, at most.
        solver: a deterministic one; the run's own if None.
        n: noises that the grid is fitted to; as many others judge it.
        seed: of the first noise.
        device_name: `cpu`, `cuda`, `mps`; None picks the fastest there is.

    Returns:
        `solver`, `steps`, `calls`, `times`, and under `distances` the root mean square distance to
        the reference, in pictures of [-1, 1], on each named grid and the tuned one; `own` names the
        solver's own grid and `kept` says whether the tuned one is better than all.

    Raises:
        UserError: no diffusion model, or a packaged one; an unknown or stochastic solver, or too
            few calls.
    """
    if checkpoint.model_file(run).parent == checkpoint.PACKAGED:
        raise UserError(
            f"{run} is a packaged model, which keeps no times; train one, or give --steps and "
            "--grid"
        )
    trained = sampling.load(run, device_name)
    if not isinstance(trained.model, Diffusion):
        raise UserError(
            f"{trained.name} is not drawn in steps; tune-steps is for runs of diffusion models"
        )
    if not trained.draws:
        raise UserError(
            f"{trained.name} draws from given pictures; tune-steps is for models that need none"
        )
    chosen = trained.options({"solver": solver})
    name = chosen.get("solver", SOLVER)
    known = [key for key, each in SOLVERS.items() if not each.stochastic]
    if name not in known:
        why = "draws fresh noise, so it has no reference" if name in SOLVERS else "is not known"
        raise UserError(f"solver '{name}' {why}; expected one of {', '.join(known)}")
    steps = (calls - SOLVERS[name].extra) // SOLVERS[name].calls
    if not 2 <= steps < REFERENCE:
        raise UserError(
            f"{calls} calls are {max(steps, 0)} steps of {name}: nothing to tune; expected 2 steps "
            f"to {REFERENCE - 1}, for {REFERENCE} are the reference"
        )
    if n < 1:
        raise UserError(f"asked to fit to {n} noises; expected at least 1")
    schedule = trained.model.schedule
    fixed = {k: v for k, v in chosen.items() if k not in ("grid", "steps")}
    many = {k: v for k, v in fixed.items() if k not in SOLVERS[name].options}
    many |= {"solver": "dpmpp_2m", "steps": REFERENCE}
    fitting, judging = range(seed, seed + n), range(seed + n, seed + 2 * n)

    def drawing(seeds: range) -> Draw:
        few = {**fixed, "solver": name, "steps": steps}
        return lambda times: _draw(trained, seeds, {**few, "grid": times.tolist()})

    grids = {key: grid(schedule, steps) for key, grid in GRIDS.items()}
    target, draw = _draw(trained, fitting, many), drawing(fitting)
    nearest = min(grids, key=lambda key: _distance(draw(grids[key]), target))
    grids["tuned"] = fit(draw, target, schedule, grids[nearest])
    target, draw = _draw(trained, judging, many), drawing(judging)
    distances = {key: _distance(draw(times), target) for key, times in grids.items()}
    kept = min(distances, key=lambda key: distances[key]) == "tuned"
    entry = {"solver": name, "steps": steps, "times": grids["tuned"].tolist()}
    if kept:
        _keep(run, entry)
    own = next(key for key, grid in GRIDS.items() if grid is SOLVERS[name].grid)
    calls = steps * SOLVERS[name].calls + SOLVERS[name].extra
    return {**entry, "calls": calls, "own": own, "distances": distances, "kept": kept}


def _keep(run: str | Path, entry: dict[str, Any]) -> None:
    """Write a tuned grid into a run, in the place of any for the same solver and steps."""
    tensors, facts = checkpoint.read_model(run)
    others = [
        each
        for each in facts.get("tuned", [])
        if (each["solver"], each["steps"]) != (entry["solver"], entry["steps"])
    ]
    checkpoint.write(checkpoint.model_file(run), tensors, {**facts, "tuned": [*others, entry]})
