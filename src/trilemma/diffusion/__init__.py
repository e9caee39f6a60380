"""The four swappable parts of a diffusion model: schedule, target, solver, guidance."""
