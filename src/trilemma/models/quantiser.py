"""Vector quantisation: each vector is replaced by the nearest of K, the codebook.

van den Oord, Vinyals, Kavukcuoglu (2017), "Neural Discrete Representation Learning". Of a grid of
vectors z and the codebook e_1 .. e_K,

    k = argmin_j |z - e_j|,    z_q = e_k                                      (equations 1 and 2)

The choice of k has no gradient; what comes after passes its own straight through to z, as if z_q
were z (section 3.2).

The codebook does not follow a gradient: each e_k is the running mean of the z that chose it
(appendix A.1),

    N_k <- g N_k + (1 - g) n_k,    m_k <- g m_k + (1 - g) sum_{z of k} z,    e_k = m_k / N_k,

for a batch with n_k vectors of code k. A code that is hardly chosen would never move again, so it
is restarted at a vector drawn from the batch (Dhariwal et al. 2020, "Jukebox: A Generative Model
for Music", section 3.1). At first nearly all are restarted: that is how the codebook begins. While
few images have been seen the encoder changes fast, and g is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma import distributed
from trilemma.batch import Batch
from trilemma.networks.layers import check_channels, check_shape


@dataclass
class Gathered:
    """What the parts of one batch tell of the codes, kept until the optimizer has moved.

    Attributes:
        seen: of the batch, by which its parts know each other.
        counts: (h w, K) how often each code was chosen at each place.
        sums: (K, D) of the vectors that chose it.
        keys: random numbers of the candidates for a restart, the greatest in the batch.
        candidates: (at most K, D) their vectors.
    """

    seen: int
    counts: Tensor
    sums: Tensor
    keys: Tensor
    candidates: Tensor


class Quantiser(nn.Module):
    """A codebook for grids of vectors, and how often each code stands at each place.

    Args:
        size: K.
        latent: D, the length of the vectors.
        grid: (h, w).
        halflife: of the running means, in images; at most a tenth of the images seen so far.
        restart: a code chosen less often than this share of the mean is restarted.
    """

    codebook: Tensor
    share: Tensor
    moment: Tensor
    frequency: Tensor

    def __init__(
        self, size: int, latent: int, grid: tuple[int, int], halflife: float, restart: float
    ) -> None:
        super().__init__()
        if size < 2:
            raise ValueError(f"codebook_size is {size}; expected at least 2")
        if not 0 < restart < 1:
            raise ValueError(f"restart is {restart}; expected a share between 0 and 1")
        self.size, self.grid, self.halflife, self.restart = size, grid, halflife, restart
        self.register_buffer("codebook", torch.randn(size, latent))  # until restarted
        self.register_buffer("share", torch.zeros(size))  # N and m, over all vectors
        self.register_buffer("moment", torch.zeros(size, latent))
        self.register_buffer("frequency", torch.zeros(*grid, size))
        self._gathered: Gathered | None = None

    def forward(self, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Quantise the vectors z (B, D, h, w) of a training batch, and remember them for `update`.

        Returns:
            (B, D, h, w) z_q, whose gradient is z's; and the mean of |z - z_q|^2 over components,
            whose gradient draws z to its code.
        """
        z = z.float()
        code = self.nearest(z)
        quantised = self.vectors(code)
        self._gather(batch, z.detach(), code)
        return z + (quantised - z).detach(), F.mse_loss(z, quantised)

    def nearest(self, z: Tensor) -> Tensor:
        """Choose codes (B, h, w), int64, for vectors (B, D, h, w)."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would mix up near codes
            similarity = z.float().movedim(1, -1) @ self.codebook.T  # (B, h, w, K)
        return (self.codebook.square().sum(1) - 2 * similarity).argmin(-1)

    def vectors(self, code: Tensor) -> Tensor:
        """Look up the vectors (B, D, h, w) of codes (B, h, w)."""
        return self.codebook[code].movedim(-1, 1)

    def check(self, codes: Tensor) -> None:
        """Raise ValueError when codes are of another shape, or not in the codebook."""
        check_shape("codes", codes, *self.grid)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.size:
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())} were given; "
                f"the codebook has 0 to {self.size - 1}"
            )

    def use(self) -> dict[str, Tensor]:
        """Tell how the codebook is used, for the log.

        `perplexity` is the number of codes that, used alike, would have the same entropy;
        `codes_used` the share of codes above the threshold of the restart.
        """
        share = self.frequency.mean((0, 1))
        share = share / share.sum().clamp(min=1e-12)
        return {
            "perplexity": torch.special.entr(share).sum().exp(),
            "codes_used": (share * self.size > self.restart).float().mean(),
        }

    @torch.no_grad()
    def _gather(self, batch: Batch, z: Tensor, code: Tensor) -> None:
        places, size = z[0, 0].numel(), self.size
        place = torch.arange(places, device=z.device)
        counts = torch.bincount((place * size + code.flatten(1)).flatten(), minlength=places * size)
        vectors = z.movedim(1, -1).flatten(0, 2)  # (B h w, D)
        sums = torch.zeros_like(self.moment).index_add_(0, code.flatten(), vectors)
        keys = batch.rng.uniform(places).flatten()
        candidates, counts = vectors, counts.view(places, size)
        before = self._gathered
        if before is not None and before.seen == batch.seen:
            counts, sums = counts + before.counts, sums + before.sums
            keys = torch.cat([before.keys, keys])
            candidates = torch.cat([before.candidates, candidates])
        keys, chosen = keys.topk(min(size, len(keys)))
        self._gathered = Gathered(batch.seen, counts, sums, keys, candidates[chosen])

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes to the mean of their vectors, restart the dead, count by place."""
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            return
        counts = distributed.gather(gathered.counts).sum(0).float()  # (h w, K), of all processes
        images, vectors = counts[0].sum(), counts.sum()
        forget = 1 - 0.5 ** (images / min(self.halflife, gathered.seen / 10))
        self.frequency.lerp_((counts / images).view_as(self.frequency), forget)
        self.share.lerp_(counts.sum(0) / vectors, forget)
        self.moment.lerp_(distributed.gather(gathered.sums).sum(0) / vectors, forget)

        keys = distributed.gather(gathered.keys).flatten()
        order = keys.argsort(descending=True)
        candidates = distributed.gather(gathered.candidates).flatten(0, 1)[order]
        dead = (self.share * self.size < self.restart).nonzero()[:, 0][: len(candidates)]
        self.share[dead] = 1 / self.size
        self.moment[dead] = candidates[: len(dead)] / self.size
        self.frequency[:, :, dead] = 0
        chosen = self.share > 0  # all, unless the first batches had fewer vectors than codes
        self.codebook[chosen] = self.moment[chosen] / self.share[chosen, None]


class Coded:
    """From images to codes and back: what every model around a `Quantiser` can do."""

    encoder: nn.Module
    decoder: nn.Module
    quantiser: Quantiser
    latent: int
    code_shape: tuple[int, int]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(D, h, w) of the vectors of a picture's codes."""
        return self.latent, *self.code_shape

    def codes(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to codes (B, h, w), int64."""
        return self.quantiser.nearest(self.encoder(image))

    def from_codes(self, codes: Tensor) -> Tensor:
        """Map codes (B, h, w) to images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: codes of another shape, or that are not in the codebook.
        """
        self.quantiser.check(codes)
        return self._drawn(codes)

    def vectors(self, codes: Tensor) -> Tensor:
        """Look up the vectors (B, D, h, w) of codes (B, h, w)."""
        return self.quantiser.vectors(codes)

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to the vectors (B, D, h, w) of their codes."""
        return self.vectors(self.codes(image))

    def decode(self, latent: Tensor) -> Tensor:
        """Map vectors (B, D, h, w), each taken as its nearest code, to images in [-1, 1].

        Raises:
            ValueError: latents of other channels.
        """
        check_channels("latents", latent, self.latent)
        return self._drawn(self.quantiser.nearest(latent))

    def _drawn(self, codes: Tensor) -> Tensor:
        return self.decoder(self.quantiser.vectors(codes)).float().clamp(-1, 1)
