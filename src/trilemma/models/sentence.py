"""A pretrained sentence encoder as a text tower.

A model of the kind that Reimers & Gurevych 2019, "Sentence-BERT", train: a bidirectional
transformer whose tokens' mean is the feature of the sentence. It is read with the `transformers`
library from a folder, or the zip of one, that holds config.json, model.safetensors and
tokenizer.json; all-MiniLM-L6-v2 is one of 22 million parameters. Pickled weights are not read.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

FILES = ("config.json", "model.safetensors", "tokenizer.json")


class SentenceEncoder(nn.Module):
    """Maps sentences to the mean of their tokens' features.

    A run that is trained with it needs the folder again when it is loaded.

    Args:
        path: the folder, or a zip with it inside.
        context: the longest sequence; longer sentences are cut.
        learns: train it along; else it stays as it is.
    """

    def __init__(self, path: str, context: int = 128, learns: bool = False) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise ValueError(
                "a pretrained sentence encoder needs the transformers library: "
                "pip install transformers"
            ) from None
        from tokenizers import Tokenizer

        place = Path(path).expanduser()
        with tempfile.TemporaryDirectory() as drafts:
            folder = _unpacked(place, Path(drafts)) if place.suffix == ".zip" else place
            missing = [name for name in FILES if not (folder / name).is_file()]
            if missing:
                raise ValueError(
                    f"{place} holds no {', '.join(missing)}; expected the folder of a sentence "
                    f"encoder with {', '.join(FILES)}, or its zip"
                )
            try:
                self.network = transformers.AutoModel.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True
                )
                self.pieces = Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # of either library: all mean that it cannot be read
                raise ValueError(f"{place} cannot be read: {error}") from error
        config = self.network.config
        self.width, self.context, self.learns = config.hidden_size, context, learns
        self.network.requires_grad_(learns)
        self.pieces.enable_truncation(min(context, config.max_position_embeddings))
        self.pieces.enable_padding(pad_id=config.pad_token_id or 0)

    def train(self, mode: bool = True) -> SentenceEncoder:
        """Stay in evaluation mode where it does not learn."""
        return super().train(mode and self.learns)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token numbers (B, T) and the mask (B, T) of B texts."""
        codes = self.pieces.encode_batch(list(texts))
        ids = torch.tensor([code.ids for code in codes])
        return ids, torch.tensor([code.attention_mask for code in codes]).bool()

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map token numbers (B, T) to features of tokens (B, T, width) and sentences (B, width)."""
        tokens = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weight = mask[..., None].to(tokens.dtype)
        return tokens, (tokens * weight).sum(1) / weight.sum(1)


def _unpacked(archive: Path, folder: Path) -> Path:
    """Write the files that are needed from a zip into `folder`; return it.

    Raises:
        ValueError: the zip cannot be read.
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
        raise ValueError(f"{archive} cannot be read: {error}") from error
    return folder
