"""VQ-VAE: pictures as grids of codes, each one of a codebook's vectors.

van den Oord, Vinyals, Kavukcuoglu (2017), "Neural Discrete Representation Learning". The encoder
maps an image x to a grid of vectors z, each is replaced by the nearest z_q of a codebook, which
follows the vectors that choose it (`models.quantiser`), and the decoder is to restore x:

    loss = |x - decoder(z_q)|^2  +  commitment |z - sg(z_q)|^2     (equation 3; sg: no gradient)

The decoder's gradient passes straight through to z; the second term keeps z near its code. Both
are means, over pixels and over the components of z.

Samples. The paper trains an autoregressive network over the codes, and that prior, a model of its
own, is what makes good pictures. By itself the VQ-VAE only counts while it trains how often each
code stands at each place, and draws the places independently of each other: such pictures have
the right parts in likely places, and no more agreement between them than that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.model import Losses, Model, Phase
from trilemma.models.quantiser import Coded, Quantiser


class VQVAE(Coded, Model):
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
        self.encoder, self.decoder = encoder, decoder
        self.codebook_size, self.commitment = codebook_size, commitment
        self.latent: int = encoder.latent  # type: ignore[assignment]
        self.code_shape: tuple[int, int] = encoder.grid  # type: ignore[assignment]
        self.quantiser = Quantiser(codebook_size, self.latent, self.code_shape, halflife, restart)

    def phases(self) -> list[Phase]:
        """Encoder and decoder learn together; the codebook follows."""
        learn = [self.encoder, self.decoder]
        return [Phase("vqvae", self.loss, learn, after=self.quantiser.update)]

    def loss(self, batch: Batch) -> Losses:
        """Squared error of the reconstruction, and what keeps the encoder near the codebook."""
        latent, distance = self.quantiser(self.encoder(batch.image), batch)
        error = F.mse_loss(self.decoder(latent).float(), batch.image)
        told = {"error": error.detach(), "distance": distance.detach(), **self.quantiser.use()}
        return {"loss": error + self.commitment * distance, **told}

    def sample(self, condition: Condition, rng: Rng, *, temperature: float = 1.0) -> Tensor:
        """Draw each place's code as often as it stood there in training, apart from the others.

        Args:
            condition: only its count is used.
            rng: one stream per image.
            temperature: below 1, frequent codes become more frequent still.

        Raises:
            ValueError: a temperature of 0 or less.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected more than 0")
        logits = self.quantiser.frequency.flatten(0, 1).clamp(min=1e-30).log()  # (h w, K)
        reached = (logits / temperature).softmax(1).cumsum(1)
        reached = reached / reached[:, -1:]  # ends at 1 exactly, which no draw exceeds
        codes = torch.searchsorted(reached, rng.uniform(len(reached)).T.contiguous())  # (h w, B)
        return self.from_codes(codes.T.reshape(-1, *self.code_shape))
