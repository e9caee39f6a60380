"""The text transformer: what it may see, where its feature lies, its shapes and errors."""

import pytest
import torch

from trilemma.networks.layers import attend
from trilemma.networks.text import TextTransformer


def tiny(**options):
    torch.manual_seed(0)
    defaults = {"width": 16, "depth": 2, "heads": 2, "vocabulary": 20, "context": 12, "end": 19}
    return TextTransformer(**{**defaults, **options}).eval()


IDS = torch.tensor([[18, 3, 4, 19, 19, 19], [18, 5, 19, 19, 19, 19]])


@pytest.mark.parametrize("embedding", [None, 4])
def test_shapes_and_the_end_token_holds_the_feature(embedding):
    tokens, text = tiny(embedding=embedding)(IDS)
    assert tokens.shape == (2, 6, 16) and text.shape == (2, 16)
    assert torch.equal(text, torch.stack([tokens[0, 3], tokens[1, 2]]))


def test_causal_features_ignore_what_comes_after_and_the_padding():
    network = tiny()
    tokens, text = network(IDS)
    other = IDS.clone()
    other[0, 2] = 7
    assert torch.allclose(network(other)[0][:, :2], tokens[:, :2], atol=1e-6)
    assert not torch.allclose(network(other)[1][0], text[0], atol=1e-3)
    padded = torch.where(torch.arange(6) > torch.tensor([[3], [2]]), 0, IDS)
    assert torch.allclose(network(padded)[1], text, atol=1e-6)
    assert torch.allclose(network(IDS[:, :4])[1], text, atol=1e-6)


def test_without_causality_the_mask_hides_the_padding():
    network = tiny(causal=False)
    mask = torch.arange(6) <= torch.tensor([[3], [2]])
    text = network(IDS, mask)[1]
    padded = torch.where(mask, IDS, 0)
    assert torch.allclose(network(padded, mask)[1], text, atol=1e-6)
    other = IDS.clone()
    other[0, 2] = 7
    assert not torch.allclose(network(other, mask)[0][0, 0], network(IDS, mask)[0][0, 0], atol=1e-4)


def test_a_factorised_embedding_is_small():
    count = sum(p.numel() for p in TextTransformer(128, 2, 4, embedding=64).parameters())
    assert count < 4_000_000


def test_bfloat16_attention_with_gradient_agrees_with_the_kernel():
    q, k, v = torch.randn(3, 2, 4, 8, 16).unbind(0)
    mask = torch.rand(2, 1, 1, 8) < 0.8
    mask[..., 0] = True
    for options in ({"causal": True}, {"mask": mask}, {"mask": mask, "causal": True}):
        exact = attend(q, k, v, **options)
        learning = [x.bfloat16().requires_grad_() for x in (q, k, v)]
        assert torch.allclose(attend(*learning, **options).float(), exact, atol=0.05)


def test_bad_input():
    with pytest.raises(ValueError, match="texts of 13 tokens"):
        tiny()(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of the 3 heads"):
        tiny(heads=3)
    with pytest.raises(ValueError, match="activation 'relu' is not one of"):
        tiny(activation="relu")
