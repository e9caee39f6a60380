"""Tiny Stable Diffusion checkpoints of random weights, saved by diffusers."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from trilemma.batch import Rng

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}


def tokenizer(pad="<|endoftext|>"):
    """One token for each letter."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)


def tower(width, act, projected=False, layers=2, vocabulary=514):
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=max(width // 64, 1),
        num_hidden_layers=layers,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def wild(module):
    """Make biases and norms matter too."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def autoencoder(scale=0.18215):
    return wild(
        AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=scale,
            sample_size=32,
        )
    )


def unet(version, channels=4):
    both = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    told = dict(sample_size=16, in_channels=channels, layers_per_block=1, norm_num_groups=32)
    if version == "1":
        told |= dict(
            block_out_channels=(32, 64), cross_attention_dim=64, attention_head_dim=8
        )
    elif version == "2":
        told |= dict(
            block_out_channels=(64, 128),
            cross_attention_dim=64,
            attention_head_dim=(1, 2),
            use_linear_projection=True,
        )
    else:
        both = (
            ("DownBlock2D", "CrossAttnDownBlock2D"),
            ("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        told |= dict(
            block_out_channels=(64, 128),
            cross_attention_dim=128,
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=64 + 6 * 256,
        )
    made = UNet2DConditionModel(down_block_types=both[0], up_block_types=both[1], **told)
    return wild(made)


def pipeline(version="1", channels=4, prediction="epsilon", vocabulary=None):
    """A pipeline of diffusers; with a vocabulary of CLIP's size, for single files."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        **SCALED, steps_offset=1, clip_sample=False, set_alpha_to_one=False,
        prediction_type=prediction,
    )
    words = vocabulary or 514
    parts = dict(vae=autoencoder(), unet=unet(version, channels), scheduler=scheduler)
    if version == "XL":
        return StableDiffusionXLPipeline(
            text_encoder=tower(64, "quick_gelu", vocabulary=words),
            text_encoder_2=tower(64, "gelu", projected=True, vocabulary=words),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer("!"),
            add_watermarker=False,
            **parts,
        )
    act = "quick_gelu" if version == "1" else "gelu"
    return StableDiffusionPipeline(
        text_encoder=tower(64, act, vocabulary=words),
        tokenizer=tokenizer("<|endoftext|>" if version == "1" else "!"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


class SameNoise:
    """Gives diffusers the noise that our streams draw."""

    def __init__(self, seeds):
        self.rng = Rng(seeds)

    def __call__(self, shape, *more, **_):
        return self.rng.normal(*shape[1:])


def draw_theirs(pipe, monkeypatch, seeds, **told):
    """Return diffusers' picture (B, 3, H, W) in [-1, 1]."""
    pipe.set_progress_bar_config(disable=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", SameNoise(seeds))
        images = pipe(output_type="pt", **told).images
    return images * 2 - 1
