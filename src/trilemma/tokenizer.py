"""CLIP's tokens: words to numbers by its byte-pair vocabulary.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
section 2.4: a lower-cased byte-pair encoding (Sennrich, Haddow, Birch 2016) of 49,152 tokens, in
brackets of a start and an end token. The merges are OpenAI's file (assets/, its licence beside it);
the `tokenizers` library applies them, by the same rules as `transformers`' CLIPTokenizer: Unicode
composed (NFC), white space to single spaces, lower case. OpenAI's own code also mends broken
encodings and HTML entities first, which is left to whoever has such text.
"""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import tokenizers

VOCABULARY = 49_408
START, END = 49_406, 49_407
CONTEXT = 77
_MERGES = 48_894  # of the file's; the rest of it CLIP does not use
_STEP = 8  # lengths are multiples of this, so that there are few of them
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokenizer:
    """Texts to token numbers.

    Args:
        context: the longest sequence, start and end included; longer texts are cut, with a warning.
        pad: the number that fills up short sequences: the end token, as in Stable Diffusion 1; 0 in
            OpenAI's and OpenCLIP's models. What comes after the first end token is not read by a
            causal transformer that is pooled there.
    """

    def __init__(self, context: int = CONTEXT, pad: int = END) -> None:
        if context < 3:
            raise ValueError(f"context is {context}; start, a word and end need 3")
        self.context, self.pad = context, pad

    def __call__(self, texts: Sequence[str], full: bool = False) -> tuple[Tensor, Tensor]:
        """Return token numbers (B, T) int64, and a mask (B, T), True up to the first end token.

        Args:
            texts: B strings; an empty one is a start and an end.
            full: T is the context; else the longest text's length, rounded up to a multiple of 8.
        """
        if isinstance(texts, str):
            raise TypeError(f"a list of texts is expected; got the text {texts!r}")
        rows = [code.ids for code in _library().encode_batch(list(texts))]
        long = [text for text, row in zip(texts, rows, strict=True) if len(row) > self.context]
        if long:
            more = f", and {len(long) - 1} more" if len(long) > 1 else ""
            warnings.warn(
                f"texts are cut to {self.context} tokens: {_short(long[0])!r}{more}", stacklevel=2
            )
        rows = [
            row if len(row) <= self.context else [*row[: self.context - 1], END] for row in rows
        ]
        longest = max((len(row) for row in rows), default=0)
        length = self.context if full else min(self.context, -(-longest // _STEP) * _STEP)
        ids = torch.full((len(rows), length), self.pad)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return ids, torch.arange(length) < lengths[:, None]

    def count(self, text: str) -> int:
        """Return how many tokens a text has, start and end included, before any is cut."""
        return len(_library().encode(text).ids)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Return the words of one sequence (T,), up to its first end token, without start."""
        row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        row = row[: row.index(END)] if END in row else row
        text = _library().decode([i for i in row if i != START], skip_special_tokens=False)
        return text.replace("</w>", " ").strip()


def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Return CLIP's tokens by their numbers, and the pairs that merge, the first first."""
    packed = resources.files("trilemma") / "assets" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 1 + _MERGES]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    letters = _letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    return [*words, "<|startoftext|>", "<|endoftext|>"], merges


@lru_cache
def _library() -> tokenizers.Tokenizer:
    """Build CLIP's tokenizer of the packaged merges."""
    from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE

    words, merges = vocabulary()
    made = Library(
        BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token="<|endoftext|>",
        )
    )
    made.add_special_tokens([AddedToken(word, normalized=False) for word in words[-2:]])
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", START), ("<|endoftext|>", END)],
    )
    made.decoder = decoders.ByteLevel()
    return made


def _letters() -> list[str]:
    """Return the 256 characters that stand for bytes, in the order of CLIP's vocabulary.

    A byte that is a visible character of Latin-1 stands for itself, the others, in their order, for
    the characters from number 256 on: Radford et al. 2019 (GPT-2).
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
