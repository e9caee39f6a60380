"""Tiny Stable Diffusion 3 and FLUX.1 pipelines of diffusers, with random weights."""

import string

import torch

WORDS = 16  # of the CLIP towers


def randomised(module, seed=0):
    """The same module with every parameter drawn anew, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        around = 1.0 if "norm" in name and "linear" not in name and value.ndim == 1 else 0.0
        if name.endswith("bias"):
            around = 0.0
        with torch.no_grad():
            value.normal_(around, 0.2 if value.ndim < 2 else 0.15, generator=generator)
    return module.eval()


def clip_tokenizer():
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + "!,.-"
    names = ["!", *(each for each in letters if each != "!"), *(f"{each}</w>" for each in letters)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=WORDS)


def clip_text(tokenizer, width=16, projection=12, seed=0, projected=True):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=WORDS,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_act="quick_gelu" if seed == 0 else "gelu",
    )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return randomised(kind(config), seed)


def t5_tokenizer():
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(each, -3.0) for each in string.ascii_lowercase + string.digits]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def t5_text(tokenizer, width=40):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return randomised(T5EncoderModel(config), 3)


def autoencoder(scaling, shift):
    from diffusers import AutoencoderKL

    return randomised(
        AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=scaling,
            shift_factor=shift,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        4,
    )


def sd3_pipeline(t5=True, medium35=False):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=40,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        qk_norm="rms_norm" if medium35 else None,
        dual_attention_layers=(0,) if medium35 else (),
    )
    tokenizers = clip_tokenizer(), clip_tokenizer(), t5_tokenizer() if t5 else None
    return StableDiffusion3Pipeline(
        transformer=randomised(transformer, 5),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(1.5305, 0.0609),
        text_encoder=clip_text(tokenizers[0], 16, 12, 0),
        text_encoder_2=clip_text(tokenizers[1], 20, 12, 1),
        text_encoder_3=t5_text(tokenizers[2]) if t5 else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=tokenizers[2],
    )


def flux_pipeline(guided=True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=16,
        guidance_embeds=guided,
        axes_dims_rope=(4, 14, 14),
    )
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        if guided
        else FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        transformer=randomised(transformer, 6),
        scheduler=scheduler,
        vae=autoencoder(0.3611, 0.1159),
        text_encoder=clip_text(tokenizer, 16, projected=False),
        text_encoder_2=t5_text(tokenizer_2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    )
