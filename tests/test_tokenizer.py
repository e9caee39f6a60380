"""CLIP's tokens: parity with two public tokenizers, lengths, masks, cutting."""

import gzip
from importlib import resources

import pytest
import torch

import peers
from trilemma.tokenizer import CONTEXT, END, START, VOCABULARY, Tokenizer

TRICKY = [
    "",
    "a photo of a cat",
    "  A  PHOTO\n\tof   a Cat  ",
    "it's they're I'll we've I'd don't",
    "3 red apples, 12.5% off!!! (maybe?)",
    "Crème brûlée à l'école, straße",
    "cre\u0300me",  # composed by NFC
    "日本語の絵 한국어 العربية",
    "🍎🍏 red apple 👩🏽‍🚀",
    "hyphen-ated under_scored semi;colon",
    "a" * 200,
    "<|startoftext|> inside <|endoftext|> outside",
    "İstanbul DŽ ﬁne",
    "x\u00a0y\u3000z\u200bw",
    "'S 'T it'S",
]


def test_parity_with_transformers():
    transformers = pytest.importorskip("transformers")
    from trilemma.tokenizer import _letters

    packed = resources.files("trilemma") / "assets" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")[1:48895]
    letters = _letters()
    words = letters + [x + "</w>" for x in letters] + [line.replace(" ", "") for line in lines]
    vocab = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    theirs = transformers.CLIPTokenizer(vocab=vocab, merges=[tuple(x.split()) for x in lines])
    for text in TRICKY:
        assert Tokenizer(context=300)([text])[0][0].tolist()[: len(theirs(text).input_ids)] == (
            theirs(text).input_ids
        ), text


def test_parity_with_open_clip():
    theirs = peers.open_clip("tokenizer").SimpleTokenizer(context_length=300)
    ours = Tokenizer(context=300, pad=0)
    for text in TRICKY:
        if "<|" in text or "İ" in text:  # theirs writes the special tokens otherwise
            continue
        assert torch.equal(ours([text], full=True)[0], theirs([text])), text


def test_lengths_masks_and_padding():
    tokens = Tokenizer()
    ids, mask = tokens(["apple", "a big red apple on a green table", ""])
    assert ids.shape == mask.shape == (3, 16) and ids.dtype == torch.int64
    assert ids[2].tolist() == [START] + [END] * 15
    assert mask.sum(1).tolist() == [3, 10, 2]
    assert tokens.count("apple") == 3
    assert ids.max() < VOCABULARY
    full, _ = tokens(["apple"], full=True)
    assert full.shape == (1, CONTEXT) and torch.equal(full[:, :16], ids[:1])
    assert Tokenizer(pad=0)(["apple"])[0][0, 3:].eq(0).all()
    assert tokens([])[0].shape == (0, 0)


def test_long_texts_are_cut_with_a_warning():
    with pytest.warns(UserWarning, match="cut to 8 tokens: 'one two"):
        ids, mask = Tokenizer(context=8)(["one two three four five six seven eight nine"])
    assert ids.shape == (1, 8) and ids[0, -1] == END and mask.all()


def test_decode_gives_the_words_back():
    tokens = Tokenizer()
    for text in ("a red apple , please", "crème", "🍎"):
        assert tokens.decode(tokens([text])[0][0]) == text


def test_bad_input():
    with pytest.raises(TypeError, match="a list of texts"):
        Tokenizer()("apple")
    with pytest.raises(ValueError, match="context is 2"):
        Tokenizer(context=2)
