"""Texts as Stable Diffusion 3 and FLUX.1 read them: by CLIP and by T5.

Stable Diffusion 3 (Esser et al. 2024, section 4) asks two CLIP towers for the hidden states before
their last layer, lays them beside each other, fills them up with zeros to T5's width, and puts T5's
states behind; its one vector is the two towers' projected ones. Without T5, its states are zeros.
FLUX.1's words are T5's alone, and its vector is that of one CLIP tower before any projection.

T5 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer") is the encoder of `transformers`. It reads the padding too, as in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.errors import UserError
from trilemma.networks.layers import Embedded
from trilemma.stable.text import transformers

SD3_WORDS, FLUX_WORDS = 256, 512
"""How many of T5's tokens the models read."""


class Encoder(NamedTuple):
    """A tokenizer and the encoder of its tokens, both of `transformers`."""

    tokenizer: Any
    network: nn.Module

    def room(self, length: int | None) -> int:
        """Return how many tokens are read: `length`, or as many as CLIP has positions for."""
        config: Any = self.network.config
        return length or config.max_position_embeddings

    def tokens(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Return tokens (B, length), cut and filled up to `room`."""
        told = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.room(length),
            truncation=True,
            return_tensors="pt",
        )
        return told.input_ids.to(next(self.network.parameters()).device)

    def cut(self, text: str, length: int | None = None) -> str:
        """Return the part of a text that does not fit, "" where all does."""
        whole = self.tokenizer(text).input_ids
        room = self.room(length) - 1  # the last is the end's
        return self.tokenizer.decode(whole[room:-1]) if len(whole) > room + 1 else ""


def for_sd3(
    texts: Sequence[str], clips: tuple[Encoder, Encoder], t5: Encoder | None, width: int
) -> Embedded:
    """Return the texts as `MMDiT` reads them: a vector, and 77 + 256 words of width `width`."""
    states, vectors = [], []
    for clip in clips:
        told = clip.network(clip.tokens(texts), output_hidden_states=True)
        states.append(told.hidden_states[-2])
        vectors.append(told.text_embeds)
    beside = torch.cat(states, dim=2)
    words = F.pad(beside, (0, width - beside.shape[2]))
    if t5 is None:
        behind = words.new_zeros(len(words), SD3_WORDS, width)
    else:
        behind = t5.network(t5.tokens(texts, SD3_WORDS))[0].to(words.dtype)
    return Embedded(vector=torch.cat(vectors, dim=1), tokens=torch.cat([words, behind], dim=1))


def for_flux(texts: Sequence[str], clip: Encoder, t5: Encoder) -> Embedded:
    """Return the texts as `Flux` reads them: a vector, and 512 words."""
    vector = clip.network(clip.tokens(texts)).pooler_output
    return Embedded(vector=vector, tokens=t5.network(t5.tokens(texts, FLUX_WORDS))[0])


def config_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the arguments of `transformers.T5Config` that the shapes of an encoder say."""
    at = "encoder.block.0.layer"
    vocabulary, width = shapes["shared.weight"]
    inner = shapes[f"{at}.0.SelfAttention.q.weight"][0]
    buckets, heads = shapes[f"{at}.0.SelfAttention.relative_attention_bias.weight"]
    gated = f"{at}.1.DenseReluDense.wi_0.weight" in shapes
    wide = shapes[f"{at}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0]
    blocks = {name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": wide,
        "num_layers": len(blocks),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def tokenizer(folder: Path) -> Any:
    """Read the T5 tokenizer of a folder; raises UserError when there is none."""
    library = transformers(str(folder))
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(
            f"{folder} holds no tokenizer; expected tokenizer.json or spiece.model: texts "
            "cannot be read without; fetch the folder again, whole"
        )
    try:
        return library.T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a damaged file makes the package raise
        raise UserError(f"{folder} cannot be read as T5's tokenizer: {error}") from error
