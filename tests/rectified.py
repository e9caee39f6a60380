"""Tiny Stable Diffusion 3 and FLUX.1 pipelines of diffusers, with random weights."""

import re
import string

import torch

from trilemma.stable import flux, places, sd3

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
        num_attention_heads=1,  # as single files, which do not say it, are taken to have
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
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=16,
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


NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "up_blocks": "up",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
"""Of an autoencoder: diffusers' names to the original ones."""


def original_autoencoder(state, levels=2):
    made = {}
    for name, tensor in state.items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", name)
        for theirs, original in NAMES.items():
            name = name.replace(theirs, original)
        made[name] = tensor
    return made


def single_file(pipeline, only_transformer=False):
    """The tensors of an original file of a pipeline's weights."""
    state = pipeline.transformer.state_dict()
    if hasattr(pipeline, "tokenizer_3"):
        config = sd3.from_config(pipeline.transformer.config, "config.json")
        ours, theirs = sd3.diffusers_rules(config), sd3.original_rules()
        coder, t5, projected = "first_stage_model.", "text_encoder_3", True
    else:
        ours, theirs = flux.diffusers_rules(), flux.original_rules()
        coder, t5, projected = "vae.", "text_encoder_2", False
    network = network_of(pipeline)
    where = places.find(network.state_dict(), ours)
    own = {name: place.take(state[place.name]) for name, place in where.items()}
    prefix = "" if only_transformer else "model.diffusion_model."
    made = places.gather(own, places.find(own, theirs, prefix))
    if only_transformer:
        return made

    def add(prefix, tensors):
        made.update({prefix + name: tensor.clone() for name, tensor in tensors.items()})

    add(coder, original_autoencoder(pipeline.vae.state_dict()))
    clips = {"clip_l": pipeline.text_encoder}
    if projected:
        clips["clip_g"] = pipeline.text_encoder_2
    for name, clip in clips.items():
        named = {
            key if key.startswith("text_") else f"text_model.{key}": value
            for key, value in clip.state_dict().items()
        }
        add(f"text_encoders.{name}.transformer.", named)
    words = getattr(pipeline, t5).state_dict()
    words.pop("encoder.embed_tokens.weight", None)
    add("text_encoders.t5xxl.transformer.", words)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def network_of(pipeline):
    """Our network of a pipeline's shape."""
    from trilemma.networks.flux import Flux
    from trilemma.networks.mmdit import MMDiT

    config = pipeline.transformer.config
    if hasattr(pipeline, "tokenizer_3"):
        return MMDiT(**sd3.from_config(config, "config.json"))
    return Flux(**flux.from_config(config, "config.json"))
