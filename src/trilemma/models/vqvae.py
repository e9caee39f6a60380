"""VQ-VAE: pictures as grids of codes, each one of a codebook's vectors.

van den Oord, Vinyals, Kavukcuoglu (2017), "Neural Discrete Representation Learning". The encoder
maps an image to a grid of vectors z, and each is replaced by the nearest of K vectors e_1 .. e_K:

    k = argmin_j |z - e_j|,    z_q = e_k                                      (equations 1 and 2)

    loss = |x - decoder(z_q)|^2  +  commitment |z - sg(e_k)|^2     (equation 3; sg: no gradient)

The choice of k has no gradient; the decoder's passes straight through to z, as if z_q were z
(section 3.2). The second term keeps z near its code. Both are means, over pixels and over the
components of z.

The codebook does not follow a gradient: each e_k is the running mean of the z that chose it
(appendix A.1),

    N_k <- g N_k + (1 - g) n_k,    m_k <- g m_k + (1 - g) sum_{z of k} z,    e_k = m_k / N_k,

for a batch with n_k vectors of code k. A code that is hardly chosen would never move again, so it
is restarted at a vector drawn from the batch (Dhariwal et al. 2020, "Jukebox: A Generative Model
for Music", section 3.1). At first nearly all are restarted: that is how the codebook begins. While
few images have been seen the encoder changes fast, and g is smaller.

Samples. The paper trains an autoregressive network over the codes, and that prior, a model of its
own, is what makes good pictures. By itself the VQ-VAE only counts while it trains how often each
code stands at each place, and draws the places independently of each other: such pictures have
the right parts in likely places, and no more agreement between them than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma import distributed
from trilemma.batch import Batch, Condition, Rng
from trilemma.model import Losses, Model, Phase
from trilemma.networks.layers import check_shape


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


class VQVAE(Model):
    """An autoencoder through a grid of codes.

    Args:
        encoder: maps images (B, C, H, W) to (B, D, h, w); tells D as `latent`, (h, w) as `grid`.
        decoder: maps (B, D, h, w) to images.
        codebook_size: K.
        commitment: weight of the second term of the loss.
        halflife: of the running means, in images; at most a tenth of the images seen so far.
        restart: a code chosen less often than this share of the mean is restarted.

    Attributes:
        codebook_size: K.
        code_shape: (h, w).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        codebook_size: int = 512,
        commitment: float = 0.25,
        halflife: float = 5_000,
        restart: float = 0.1,
    ) -> None:
        super().__init__()
        if codebook_size < 2:
            raise ValueError(f"codebook_size is {codebook_size}; expected at least 2")
        if not 0 < restart < 1:
            raise ValueError(f"restart is {restart}; expected a share between 0 and 1")
        self.encoder, self.decoder, self.codebook_size = encoder, decoder, codebook_size
        self.commitment, self.halflife, self.restart = commitment, halflife, restart
        self.latent: int = encoder.latent  # type: ignore[assignment]
        self.code_shape: tuple[int, int] = encoder.grid  # type: ignore[assignment]
        self.codebook: Tensor
        self.share: Tensor
        self.moment: Tensor
        self.frequency: Tensor
        self.register_buffer("codebook", torch.randn(codebook_size, self.latent))  # until restarted
        self.register_buffer("share", torch.zeros(codebook_size))  # N and m, over all vectors
        self.register_buffer("moment", torch.zeros(codebook_size, self.latent))
        self.register_buffer("frequency", torch.zeros(*self.code_shape, codebook_size))
        self._gathered: Gathered | None = None

    def phases(self) -> list[Phase]:
        """Encoder and decoder learn together; the codebook follows."""
        return [Phase("vqvae", self.loss, [self.encoder, self.decoder], after=self.update_codebook)]

    def loss(self, batch: Batch) -> Losses:
        """Squared error of the reconstruction, and what keeps the encoder near the codebook."""
        z = self.encoder(batch.image).float()  # (B, D, h, w)
        code = self._nearest(z)
        quantised = self._vectors(code)
        self._gather(batch, z.detach(), code)
        straight_through = z + (quantised - z).detach()
        error = F.mse_loss(self.decoder(straight_through).float(), batch.image)
        distance = F.mse_loss(z, quantised)
        share = self.frequency.mean((0, 1))
        share = share / share.sum().clamp(min=1e-12)
        return {
            "loss": error + self.commitment * distance,
            "error": error.detach(),
            "distance": distance.detach(),
            "perplexity": torch.special.entr(share).sum().exp(),
            "codes_used": (share * self.codebook_size > self.restart).float().mean(),
        }

    def _nearest(self, z: Tensor) -> Tensor:
        """Choose codes (B, h, w) for vectors (B, D, h, w)."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would mix up near codes
            similarity = z.float().movedim(1, -1) @ self.codebook.T  # (B, h, w, K)
        return (self.codebook.square().sum(1) - 2 * similarity).argmin(-1)

    def _vectors(self, code: Tensor) -> Tensor:
        """Look up the vectors (B, D, h, w) of codes (B, h, w)."""
        return self.codebook[code].movedim(-1, 1)

    @torch.no_grad()
    def _gather(self, batch: Batch, z: Tensor, code: Tensor) -> None:
        places, size = z[0, 0].numel(), self.codebook_size
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
    def update_codebook(self) -> None:
        """Move the codes to the mean of their vectors, restart the dead, count for the prior."""
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
        dead = (self.share * self.codebook_size < self.restart).nonzero()[:, 0][: len(candidates)]
        self.share[dead] = 1 / self.codebook_size
        self.moment[dead] = candidates[: len(dead)] / self.codebook_size
        self.frequency[:, :, dead] = 0
        chosen = self.share > 0  # all, unless the first batches had fewer vectors than codes
        self.codebook[chosen] = self.moment[chosen] / self.share[chosen, None]

    def codes(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to codes (B, h, w), int64."""
        return self._nearest(self.encoder(image))

    def from_codes(self, codes: Tensor) -> Tensor:
        """Map codes (B, h, w) to images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: codes of another shape, or that are not in the codebook.
        """
        check_shape("codes", codes, *self.code_shape)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())} were given; "
                f"the codebook has 0 to {self.codebook_size - 1}"
            )
        return self.decoder(self._vectors(codes)).float().clamp(-1, 1)

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to the vectors (B, D, h, w) of their codes."""
        return self._vectors(self.codes(image))

    def decode(self, latent: Tensor) -> Tensor:
        """Map vectors (B, D, h, w), each taken as its nearest code, to images in [-1, 1].

        Raises:
            ValueError: latents of another shape.
        """
        check_shape("latents", latent, self.latent, *self.code_shape)
        return self.from_codes(self._nearest(latent))

    def sample(self, condition: Condition, rng: Rng, *, temperature: float = 1.0) -> Tensor:
        """Draw each place's code as often as it stood there in training, apart from the others.

        Args:
            condition: only its count is used.
            rng: one stream per image.
            temperature: below 1, frequent codes become more frequent still.

        Raises:
            ValueError: a temperature of 0 or less.
        """
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; expected more than 0")
        logits = self.frequency.flatten(0, 1).clamp(min=1e-30).log()  # (h w, K)
        reached = (logits / temperature).softmax(1).cumsum(1)
        reached = reached / reached[:, -1:]  # ends at 1 exactly, which no draw exceeds
        codes = torch.searchsorted(reached, rng.uniform(len(reached)).T.contiguous())  # (h w, B)
        return self.from_codes(codes.T.reshape(-1, *self.code_shape))
