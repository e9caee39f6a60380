"""What a recipe's networks cost before any training: parameters, operations, memory.

One training step is taken on noise; every product, and every tensor kept for the backward pass, is
counted. Operations are FLOPs: a multiply-add is two (many papers, DiT's among them, count it as
one). Only matrix products, convolutions and attention are counted, as is usual. Memory is that of
activations in float32; in bfloat16 most take half.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from trilemma import recipe
from trilemma.batch import Batch, Condition, Rng
from trilemma.errors import UserError
from trilemma.model import Model
from trilemma.stepping import only_these_learn

PICTURES = 4  # of the batch; some layers look at several
CLASSES = 10
LATE = 10**12  # images seen: so that a step has all that comes in later in training


def _convolution_backward(
    grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, mask: Sequence[bool], **named: Any,
) -> int:  # fmt: skip
    """The gradients of the input and of the weights each take what the convolution took."""
    places = x[0] * math.prod((x if transposed else grad)[2:])
    return 2 * places * math.prod(weight) * sum(mask[:2])


# Torch's own table has no attention on a CPU, and its convolution_backward forgets groups.
_FORMULAS = {
    **flop_registry,
    torch.ops.aten.convolution_backward: shape_wrapper(_convolution_backward),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(
        lambda q, k, v, *rest, **named: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda out, q, k, v, *rest, **named: sdpa_backward_flop_count(out, q, k, v)
    ),
}


def profile(name: str, size: int | None = None) -> dict[str, Any]:
    """Count what a recipe's networks take for pictures of 3 channels and 10 classes.

    Args:
        name: a packaged recipe's name, or the path of a recipe file.
        size: height and width of the pictures; None for what the recipe's header tells of. It is
            raised to what the network can take.

    Returns:
        `recipe`; `size`; `parameters`; `networks`: for each `name`, `type`, `parameters`, `flops`
        of one picture's way through it, and `activations`, the bytes for each picture that are kept
        for its backward pass in the phase of training that keeps most; `step`: `flops` and
        `activations` of a whole training step, per picture of the batch, forwards and backwards.

    Raises:
        UserError: the recipe cannot be built, or its networks cannot take pictures of that size.
    """
    spec = recipe.load(name)
    multiple = spec.get("data", {}).get("multiple", 1)
    size = -(-(size or spec["about"].get("size", 32)) // multiple) * multiple
    facts: dict[str, Any] = {"shape": [3, size, size], "channels": 3, "size": size}
    facts |= {"classes": CLASSES, "attributes": 0, "count": 10_000}
    model: Model = recipe.build(recipe.resolve(spec, facts)["model"]).train()
    try:
        networks, step = _step(model, _noise(size))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{name} at {size} x {size} pixels: {error}") from error
    parameters = sum(p.numel() for p in model.parameters())
    told = {"recipe": str(name), "size": size, "parameters": parameters}
    return told | {"networks": networks, "step": step}


def _noise(size: int) -> Batch:
    shape = (PICTURES, 3, size, size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    label = torch.arange(PICTURES) % CLASSES
    texts = [f"a picture of a red apple and {i} pears" for i in range(PICTURES)]
    condition = Condition(PICTURES, label, text=texts, source=image.flip(0))
    return Batch(image, condition, LATE, Rng(range(PICTURES)))


def flops(work: Callable[[], object]) -> int:
    """Return the floating-point operations of `work`; a multiply-add is two."""
    with _Counter() as counter:
        work()
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up operations while it is open.

    As torch's FlopCounterMode, which cannot be open while a loss takes a gradient of its own.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._overloadpacket in _FORMULAS:
            formula = _FORMULAS[func._overloadpacket]
            self.total += formula(*args, **(kwargs or {}), out_val=made)
        return made


def _step(model: Model, batch: Batch) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Take one training step; return what each network takes, and the whole."""
    meter, phases = _Meter(model), model.phases()
    learners: dict[str, Any] = {phase.name: None for phase in phases}
    for phase in phases:
        with meter.phase(), only_these_learn(model, phase.modules, learners):
            phase.loss(batch)["loss"].backward()
    count = len(batch)
    rows = [
        {
            "name": name,
            "type": type(network).__name__,
            "parameters": sum(p.numel() for p in network.parameters()),
            "flops": meter.flops[name] / (meter.passes[name] or count),
            "activations": meter.most[name] / count,
        }
        for name, network in meter.networks.items()
    ]
    step = {"flops": meter.total / count, "activations": meter.most_of_all / count}
    return rows, step


class _Meter:
    """Counts operations and kept bytes by the network that is at work.

    Attributes:
        networks: the model's, by name.
        passes: of pictures through each network, when it was called as a whole.
        flops: of each network, forwards.
        most: bytes that a phase kept of each network, the largest of any phase.
        most_of_all: bytes that a phase kept, the largest of any phase.
        total: operations of all phases, forwards and backwards.
    """

    def __init__(self, model: Model) -> None:
        self.networks = dict(_networks("", model))
        self.passes, self.flops, self.most = Counter[str](), Counter[str](), Counter[str]()
        self.most_of_all = self.total = 0
        self._own = {t.untyped_storage().data_ptr() for t in _tensors(model)}
        self._counter = _Counter()
        self._within: list[tuple[str, int]] = []  # networks at work, and the operations before
        for name, network in self.networks.items():
            for module in network.modules():
                module.register_forward_pre_hook(partial(self._enter, name, module is network))
                module.register_forward_hook(self._leave)

    def _enter(self, name: str, whole: bool, module: nn.Module, given: tuple) -> None:
        self._within.append((name, self._counter.total))
        if whole:
            self.passes[name] += next((len(x) for x in given if isinstance(x, Tensor)), 0)

    def _leave(self, module: nn.Module, given: tuple, made: Any) -> None:
        name, before = self._within.pop()
        if name not in (other for other, _ in self._within):
            self.flops[name] += self._counter.total - before

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Count while inside."""
        kept, boxes, sizes = set(self._own), list[list[Tensor]](), Counter[str]()
        before = self._counter.total

        def keep(tensor: Tensor) -> list[Tensor]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in kept:
                kept.add(storage.data_ptr())
                sizes[self._within[0][0] if self._within else ""] += storage.nbytes()
            boxes.append([tensor])
            return boxes[-1]

        with self._counter, saved_tensors_hooks(keep, lambda box: box[0]):
            yield
        self.total += self._counter.total - before
        for box in boxes:  # the graph held them, and they the graph
            box.clear()
        self.most |= sizes
        self.most_of_all = max(self.most_of_all, sizes.total())


def _networks(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and the module of each network: children with parameters, out of lists."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _networks(f"{prefix}{name}.", child)
        elif next(child.parameters(), None) is not None:
            yield prefix + name, child


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
