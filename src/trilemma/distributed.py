"""Several processes under `torchrun`: the few collective steps that the loop needs.

With one process every function here is the identity. Gradients are averaged after the backward
pass, in one flat buffer, so any objective works (penalties with double backward included).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: torch.device) -> tuple[int, int]:
    """Join the process group that `torchrun` announced; return (rank, number of processes)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", "0")), world


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in place."""
    if not dist.is_initialized():
        return
    tensors = list(tensors)
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def average_gradients(modules: Iterable[nn.Module]) -> None:
    """Average the gradients of `modules` over all processes."""
    if not dist.is_initialized():
        return
    parameters = [p for module in modules for p in module.parameters() if p.grad is not None]
    if parameters:
        average([p.grad for p in parameters if p.grad is not None])


def gather(tensor: Tensor) -> Tensor:
    """Return the tensor of every process, all of one shape, as (processes, ...)."""
    if not dist.is_initialized():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def largest(*values: float) -> tuple[float, ...]:
    """Return the largest of each value over all processes: all take the same decision."""
    if not dist.is_initialized():
        return values
    where = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(values, dtype=torch.float64, device=where)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
