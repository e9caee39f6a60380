"""Small pieces that several networks share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Embedded:
    """A condition as networks read it; each field may be absent.

    Attributes:
        vector: (B, D), joined to the time embedding.
        tokens: (B, T, D), a sequence to attend to.
        image: (B, C, H, W), concatenated to the input.
        mask: (B, T), true for the tokens that say something; all do if None.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    image: Tensor | None = None
    mask: Tensor | None = None


def sinusoidal(position: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sine and cosine features (B, dim) of positions (B,); Vaswani et al. 2017, section 3.5.

    `dim` must be even.
    """
    half = dim // 2
    exponent = torch.arange(half, device=position.device, dtype=torch.float32) / half
    angle = position.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def one_hot(label: Tensor | None, classes: int, count: int, device: torch.device) -> Tensor:
    """Labels (B,) as rows (B, classes) of zeros and a one; `classes` may be 0: (B, 0).

    Raises ValueError when there are classes and no label, or a label that is none of them.
    """
    if not classes:
        return torch.zeros(count, 0, device=device)
    if label is None:
        raise ValueError(f"this model draws one of {classes} classes: it needs a label")
    if label.numel() and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise ValueError(
            f"labels from {int(label.min())} to {int(label.max())} were given; "
            f"the model knows 0 to {classes - 1}"
        )
    return F.one_hot(label, classes).float()


def check_shape(what: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError when a batch of `what` is not of shape (B, *shape)."""
    if tensor.shape[1:] != shape:
        raise ValueError(
            f"{what} of shape {tuple(tensor.shape)} were given; "
            f"expected (B, {', '.join(map(str, shape))})"
        )


def check_channels(what: str, tensor: Tensor, channels: int) -> None:
    """Raise ValueError when a batch of `what` is not of shape (B, channels, h, w), h and w any."""
    if tensor.ndim != 4 or tensor.shape[1] != channels:
        raise ValueError(
            f"{what} of shape {tuple(tensor.shape)} were given; expected (B, {channels}, h, w)"
        )


def check_tokens(embedded: Embedded, crosses: bool) -> None:
    """Raise ValueError when there are tokens and nothing attends to them, or the other way round.

    A network that does not read what it is told would learn to ignore it, and nobody would know.
    """
    if (embedded.tokens is not None) != crosses:
        raise ValueError(
            "the network attends to tokens, and the conditioner makes none; use conditioning.Text"
            if crosses
            else "the conditioner makes tokens, and the network does not attend to them: give it "
            "cross = true, or the conditioner tokens = false"
        )


def halvings(size: int) -> tuple[int, int]:
    """How often to halve a side of `size` pixels to come to 4 to 7: (times, what is left).

    A size that does not halve evenly is rounded up: 28 -> (2, 7), 64 -> (4, 4), 36 -> (3, 5).
    Raises ValueError below 8 pixels.
    """
    if size < 8:
        raise ValueError(f"a side of {size} pixels is too short: this network needs at least 8")
    times = math.floor(math.log2(size / 4))
    return times, -(-size // 2**times)


class GroupNorm(nn.Module):
    """Normalises groups of channels, image by image; Wu & He 2018, "Group Normalization".

    Computed and returned in float32 whatever the format of x: sums over many values need it, and
    PyTorch's bfloat16 kernel for channels-last tensors on a CPU is several times slower.
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to float32 (B, C, ...)."""
        return F.group_norm(x.float(), self.groups, self.weight, self.bias, self.eps)


class TimeEmbedding(nn.Module):
    """The time (B,) in [0, 1] by sines and cosines and a perceptron: (B, dim).

    Args:
        dim: of what is made.
        period: see `sinusoidal`.
    """

    FEATURES = 256

    def __init__(self, dim: int, period: float = 10_000.0) -> None:
        super().__init__()
        self.period = period
        self.up = nn.Linear(self.FEATURES, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        """Map times (B,) to (B, dim)."""
        return self.down(F.silu(self.up(sinusoidal(1000 * time, self.FEATURES, self.period))))


class Modulation(nn.Module):
    """Shifts, scales and gates for many layers, of one condition, by one matrix product.

    All are 0 at first. Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", adaLN.

    Args:
        embedding_dim: width of the condition.
        width: of each vector made.
        count: how many vectors.
    """

    def __init__(self, embedding_dim: int, width: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_dim, count * width)
        self.count = count
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, e: Tensor) -> list[Tensor]:
        """Make `count` vectors (B, 1, width) of a condition e (B, D)."""
        made = self.linear(F.silu(e))
        return list(made.unflatten(1, (self.count, 1, -1)).unbind(1))


def scaled_norm(norm: nn.LayerNorm, x: Tensor, told: list[Tensor]) -> Tensor:
    """Normalise x (B, N, width); with `told`, a shift and a scale: (1 + scale) norm(x) + shift.

    The normalisation is in x's type; what follows in that of shift and scale, in which the matrix
    product will be that takes the result.
    """
    h = norm(x)
    if not told:
        return h
    shift, scale = told
    return torch.addcmul(shift, h.to(shift.dtype), 1 + scale)


def gelu(x: Tensor) -> Tensor:
    """The GELU of x, x Phi(x), in Hendrycks & Gimpel's approximation by a hyperbolic tangent.

    In bfloat16 on a CPU the exact function: PyTorch's kernel of the other takes six times as long
    there, and they differ by 5e-4 at most, less than bfloat16 resolves from 0.25 on.
    """
    exact = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return F.gelu(x, approximate="none" if exact else "tanh")


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention softmax(q k^T / sqrt(D)) v of q, k, v (B, heads, N, D); Vaswani et al. 2017, (1).

    PyTorch's fused kernel, except in bfloat16 on a CPU where there is a gradient to come: forth and
    back, two matrix products with a softmax between them take half of its time as long as the
    (N, N) weights are small (a fifth of it at 50 positions); the kernel leaves out what a causal
    mask hides, so there only up to 256 positions. Forwards alone the kernel is the faster one.

    Args:
        q: queries.
        k: keys, (B, heads, M, D).
        v: values, (B, heads, M, D).
        mask: True where a query may look, of a shape that broadcasts to (B, heads, N, M).
        causal: each position looks at itself and at those before it.
    """
    small = q.dtype == torch.bfloat16 and q.shape[-2] <= (256 if causal else 1024)
    explicit = small and q.device.type == "cpu" and q.requires_grad
    if causal and (explicit or mask is not None):
        before = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask, causal = before if mask is None else before & mask, False
    if explicit:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        products = (q * q.shape[-1] ** -0.5) @ k.mT
        if mask is not None:
            products = products.masked_fill(~mask, float("-inf"))
        return torch.softmax(products, dim=-1) @ v  # of weights (B, heads, N, M)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


ACTIVATIONS = {"gelu": F.gelu, "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x)}
"""What CLIP's perceptrons use: the exact GELU, or OpenAI's approximation of it."""


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each on normalised input and around it a residual.

    The block of both of CLIP's towers (Radford et al. 2021) and of the Vision Transformer
    (Dosovitskiy et al. 2021).

    Args:
        width: of the sequence.
        heads: of the attention; they divide the width.
        expand: width of the perceptron's inner layer, in widths.
        activation: gelu or quick-gelu.
        causal: whether a position looks only at itself and at those before it.
        depth: blocks of the whole: what each adds to the residual begins as 1 / sqrt(2 depth) of
            its size, as in CLIP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        expand: float = 4,
        activation: str = "gelu",
        causal: bool = False,
        depth: int = 1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of the {heads} heads")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation '{activation}' is not one of {', '.join(ACTIVATIONS)}")
        self.heads, self.activation, self.causal = heads, activation, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        inner = round(expand * width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        less = (2 * depth) ** -0.5
        for layer, std in (
            (self.qkv, width**-0.5),
            (self.out, width**-0.5 * less),
            (self.up, (2 * width) ** -0.5),
            (self.down, width**-0.5 * less),
        ):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, N, width) to the same; `mask` as `attend`'s."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D) each
        h = attend(q, k, v, mask, self.causal)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm2(x))))


class CrossAttention(nn.Module):
    """Attention of places x (B, N, width) to tokens (B, T, D).

    Args:
        width: of the places.
        dim: D, of the tokens.
        heads: of the attention.
    """

    def __init__(self, width: int, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(dim, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, N, width) to the same; tokens where mask (B, T) is false are not seen."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None]  # (B, 1, 1, T)
        return self.out(attend(q, k, v, seen).transpose(1, 2).flatten(2))


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut x (B, C, H, W) into patches: (B, H W / patch^2, C patch^2), row by row.

    Raises ValueError when the sides are no multiples of `patch`.
    """
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(
            f"images of {height}x{width} cannot be cut into patches: sizes must be multiples of "
            f"{patch}"
        )
    return F.pixel_unshuffle(x, patch).flatten(2).mT


def unpatchify(x: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Put patches (B, N, C patch^2) together to (B, C, height, width): `patchify` undone."""
    return F.pixel_shuffle(x.mT.unflatten(2, (height // patch, width // patch)), patch)


def places(height: int, width: int) -> Tensor:
    """Row and column (height * width, 2) of each place on a grid, row by row."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


def sincos(height: int, width: int, dim: int, apart: float = 1.0) -> Tensor:
    """Sines and cosines (height * width, dim) of columns, then of rows, as DiT orders them.

    Vaswani et al. 2017, section 3.5, along two axes, places `apart` from each other; `dim` must be
    a multiple of 4.
    """
    column_row = apart * places(height, width).flip(1)
    half = sinusoidal(column_row.flatten(), dim // 2).view(-1, 2, 2, dim // 4)
    return half.flip(2).flatten(1)  # the sines first


def turns(place: Tensor, dim: int) -> Tensor:
    """Cosine and sine (2, N, dim / 2) of the angles at places (N, 2), half for each axis.

    For `turned`. Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding",
    along two axes; `dim` must be a multiple of 4. Wavelengths go from 2 pi places to nearly 100
    times that.

    Args:
        place: row and column of each position.
        dim: of the heads.
    """
    count = dim // 4
    frequency = 100.0 ** -(torch.arange(count, device=place.device) / count)
    angle = (place[:, :, None].float() * frequency).flatten(1)  # (N, dim / 2)
    return torch.stack([angle.cos(), angle.sin()])


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of queries or keys (B, heads, N, D)."""
    cos, sin = turn.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def recomputed(recompute: bool, block: Callable[..., Any], *inputs: Any) -> Any:
    """Return what a block makes of its inputs, and keep no more than these if told to.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost": activations inside a block
    are computed again when its gradient is.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class Reuse:
    """What blocks made in an earlier call of a network, to be used again in the next ones.

    Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free": from step to step of
    sampling, what deep blocks make changes little.

    Args:
        every: the blocks are computed in one call of so many.
    """

    def __init__(self, every: int) -> None:
        self.every, self.left = every, 0
        self.made: tuple[int, Any] = 0, None

    def __call__(self, compute: Callable[[], Any], rows: int) -> Any:
        """Return what `compute` returns, or returned; anew when the batch has another size."""
        if not self.left or rows != self.made[0]:
            self.made, self.left = (rows, compute()), self.every
        self.left -= 1
        return self.made[1]


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest-neighbour upsampling of x (B, C, H, W) by two, then convolution by (O, C, 3, 3).

    Each output pixel meets only 2x2 different input pixels. So the two steps are one transposed
    convolution of stride 2 whose 4x4 kernel sums, along rows and columns, the weights that meet
    the same input pixel: 4 products per output instead of 9. On a CPU only, where it was measured.
    """
    if x.device.type != "cpu":
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    o, c = weight.shape[:2]
    meets = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    meets = torch.kron(meets, meets)  # (16, 9)
    kernel = meets @ weight.permute(0, 2, 3, 1).reshape(o, 9, c)  # (O, 16, C)
    kernel = kernel.view(o, 4, 4, c).permute(3, 0, 1, 2)  # (C, O, 4, 4)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def fold_norm(
    state: dict[str, Tensor], conv: str, norm: str, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Take a convolution and the batch norm after it out of `state`; return them as one.

    A batch norm that no longer learns is an affine map, so it merges into the weights and a bias:
    `w gamma / sqrt(var + eps)` and `beta - mean gamma / sqrt(var + eps)`, here in float64.

    Raises:
        KeyError: a key is not there.
    """
    variance = state.pop(f"{norm}.running_var").double()
    scale = state.pop(f"{norm}.weight") * torch.rsqrt(variance + epsilon)
    bias = state.pop(f"{norm}.bias") - state.pop(f"{norm}.running_mean") * scale
    return state.pop(f"{conv}.weight") * scale[:, None, None, None], bias
