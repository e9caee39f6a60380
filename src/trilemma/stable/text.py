"""Texts as Stable Diffusion 1, 2 and XL read them: by the text towers of CLIP.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision". A
tower reads 75 tokens between one for the beginning and one for the end. Longer texts are cut into
so many, each is read by itself, and what is read is joined; shorter ones are filled up.

Versions 1 and 2 take the tower's last states; XL those before its last layer, of two towers side by
side, and the second tower's projected vector, that of the first 75 tokens.

Towers and tokenizers are those of `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trilemma.errors import UserError
from trilemma.networks.layers import Embedded
from trilemma.stable import loading
from trilemma.tokenizer import vocabulary


class Tower(NamedTuple):
    """A tokenizer and the encoder of its tokens, both of `transformers`."""

    tokenizer: Any
    encoder: nn.Module

    @property
    def length(self) -> int:
        """How many tokens it reads at once."""
        return self.encoder.config.max_position_embeddings  # type: ignore[union-attr, return-value]

    def pieces(self, text: str) -> list[list[int]]:
        """Return the tokens of a text in pieces of its length less 2; one, if empty, at least."""
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        room = self.length - 2
        return [tokens[start : start + room] for start in range(0, max(len(tokens), 1), room)]

    def tokens(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Return pieces of a text with beginning, end and filling: (pieces, length)."""
        tokenizer, rows = self.tokenizer, []
        for piece in pieces:
            row = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (self.length - len(row)))
        return torch.tensor(rows, device=next(self.encoder.parameters()).device)


class Reader:
    """Reads texts by one tower or two.

    Args:
        towers: one for versions 1 and 2; one or two for XL.
        inner: states before the last layer are taken, and the last tower's vector: XL.
    """

    def __init__(self, towers: Sequence[Tower], inner: bool) -> None:
        self.towers, self.inner = towers, inner

    @property
    def vector_dim(self) -> int:
        """Width of the vector, 0 for none."""
        encoder: Any = self.towers[-1].encoder
        return encoder.config.projection_dim if self.inner else 0

    def __call__(self, texts: Sequence[str]) -> Embedded:
        """Return tokens (B, T, D) and, for XL, vectors (B, vector_dim); T is the longest's."""
        distinct = list(dict.fromkeys(texts))
        states, vector = [], None
        for tower in self.towers:
            pieces = [tower.pieces(text) for text in distinct]
            most = max(len(each) for each in pieces)
            pieces = [each + [[]] * (most - len(each)) for each in pieces]
            tokens = torch.stack([tower.tokens(each) for each in pieces])  # (B, most, length)
            told = tower.encoder(input_ids=tokens.flatten(0, 1), output_hidden_states=self.inner)
            state = told.hidden_states[-2] if self.inner else told.last_hidden_state
            states.append(state.unflatten(0, (-1, most)).flatten(1, 2))
            if self.inner:
                vector = told.get("text_embeds")
                vector = None if vector is None else vector[::most]
        longest = max(state.shape[1] for state in states)
        if any(state.shape[1] != longest for state in states):
            raise UserError("the two text towers cut this text into unlike numbers of pieces")
        order = torch.tensor([distinct.index(text) for text in texts], device=states[0].device)
        read = torch.cat(states, 2)[order]
        return Embedded(vector=None if vector is None else vector[order], tokens=read)


def transformers(needed_for: str) -> Any:
    """Import the package `transformers`; raises UserError when it is not installed."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{needed_for} needs the package transformers for its text encoder: "
            "pip install 'trilemma[text]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    return transformers


def tokenizer(folder: Path) -> Any:
    """Read the CLIP tokenizer of a folder; raises UserError when there is none."""
    library = transformers(str(folder))
    has = [
        name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).is_file()
    ]
    if "tokenizer.json" not in has and len(has) < 2:
        raise UserError(
            f"{folder} holds no tokenizer; expected vocab.json and merges.txt, or tokenizer.json: "
            "texts cannot be read without; fetch the folder again, whole"
        )
    try:
        return library.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a damaged file makes the package raise
        raise UserError(f"{folder} cannot be read as CLIP's tokenizer: {error}") from error


def own_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """Return CLIP's tokenizer from the vocabulary that is packaged, for files without their own.

    Args:
        pad: the token that fills up: the end's in version 1, "!" (token 0) in OpenCLIP's towers.
    """
    library = transformers("a single file")
    words, merges = vocabulary()
    return library.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=merges,
        pad_token=pad,
    )


def empty(made: Any, kind: Any, config: Mapping[str, Any], where: str) -> nn.Module:
    """Return a network of `transformers` on the meta device.

    Args:
        made: its class.
        kind: the class of its config.
        config: of `transformers`.
        where: it comes from, for errors.

    Raises:
        UserError: a config that the package refuses.
    """
    try:
        with torch.device("meta"):
            return made(kind.from_dict(dict(config)))
    except Exception as error:  # whatever a damaged config makes the package raise
        raise UserError(f"{where} has a config that cannot be used: {error}") from error


def encoder(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    where: str,
    device: torch.device,
    kind: torch.dtype,
    projected: bool = False,
) -> nn.Module:
    """Return a CLIP text tower with its weights.

    Args:
        config: of `transformers`.
        weights: by the names of `transformers`.
        where: they come from, for errors.
        device: to run on.
        kind: number format of matrix products.
        projected: it has a projected vector.

    Raises:
        UserError: another architecture, or weights that do not fit.
    """
    named = (config.get("architectures") or ["CLIPTextModel"])[0]
    if named not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise UserError(
            f"{where} is a {named}; expected a CLIPTextModel, with projection or without"
        )
    library = transformers(where)
    projected = projected or named.endswith("WithProjection")
    made = library.CLIPTextModelWithProjection if projected else library.CLIPTextModel
    network = empty(made, library.CLIPTextConfig, config, where)
    own = network.state_dict()
    given = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    # Versions of the package differ in whether names begin with text_model.
    given = {name.removeprefix("text_model."): tensor for name, tensor in given.items()}
    if any(name.startswith("text_model.") for name in own):
        given = {
            name if name.startswith("text_projection.") else f"text_model.{name}": tensor
            for name, tensor in given.items()
        }
    loading.fill(network, given, where, device, kind)
    for name, buffer in list(network.named_buffers()):
        if name.endswith("position_ids"):
            ids = torch.arange(buffer.shape[-1], device=device)[None]
            network.get_submodule(name.rpartition(".")[0]).position_ids = ids
    return network
