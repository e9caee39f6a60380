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
        told |= dict(block_out_channels=(32, 64), cross_attention_dim=64, attention_head_dim=8)
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
        **SCALED,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
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


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _swap(name, table):
    for ours, theirs in table.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    return name


def original_unet(state, blocks=1):
    """Name a U-Net's weights as the single files do."""
    made = {}
    for name, tensor in state.items():
        part, *rest = name.split(".")
        if part in ("down_blocks", "up_blocks"):
            level, kind, i = int(rest[0]), rest[1], int(rest[2])
            inner = ".".join(rest[3:])
            if part == "down_blocks":
                place = 1 + level * (blocks + 1) + i
                where = f"input_blocks.{place}"
                if kind == "downsamplers":
                    new = f"input_blocks.{(level + 1) * (blocks + 1)}.0.op.{rest[-1]}"
            else:
                where = f"output_blocks.{level * (blocks + 1) + i}"
                if kind == "upsamplers":
                    index = level * (blocks + 1) + blocks
                    has = any(n.startswith(f"up_blocks.{level}.attentions") for n in state)
                    new = f"output_blocks.{index}.{2 if has else 1}.conv.{rest[-1]}"
            if kind == "resnets":
                new = f"{where}.0.{_swap(inner, RESNET)}"
            elif kind == "attentions":
                new = f"{where}.1.{inner}"
        elif part == "mid_block":
            inner = ".".join(rest[2:])
            if rest[0] == "attentions":
                new = f"middle_block.1.{inner}"
            else:
                new = f"middle_block.{2 * int(rest[1])}.{_swap(inner, RESNET)}"
        else:
            new = _swap(name, ENDS)
        made["model.diffusion_model." + new] = tensor
    return made


def original_autoencoder(state, sizes=2):
    made = {}
    for name, tensor in state.items():
        half, *rest = name.split(".")
        new = name
        if rest[0] in ("down_blocks", "up_blocks"):
            level = int(rest[1]) if rest[0] == "down_blocks" else sizes - 1 - int(rest[1])
            side = rest[0].removesuffix("_blocks")
            if rest[2] == "resnets":
                inner = ".".join(rest[4:]).replace("conv_shortcut", "nin_shortcut")
                new = f"{half}.{side}.{level}.block.{rest[3]}.{inner}"
            else:
                new = f"{half}.{side}.{level}.{side}sample.conv.{rest[-1]}"
        elif rest[0] == "mid_block" and rest[1] == "resnets":
            new = f"{half}.mid.block_{int(rest[2]) + 1}." + ".".join(rest[3:])
        elif rest[0] == "mid_block":
            inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
            inner = inner.get(rest[3], "proj_out")
            new = f"{half}.mid.attn_1.{inner}.{rest[-1]}"
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        elif rest[0] == "conv_norm_out":
            new = f"{half}.norm_out.{rest[-1]}"
        made["first_stage_model." + new] = tensor
    return made


def original_open_clip(module, prefix, more=0):
    """Name a text tower's weights as OpenCLIP does, with `more` layers that are not used."""
    state = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
    made, three = {}, {}
    for name, tensor in state.items():
        if name.startswith("encoder.layers."):
            _, _, i, rest = name.split(".", 3)
            head, _, kind = rest.rpartition(".")
            if head.startswith("self_attn.") and head != "self_attn.out_proj":
                three.setdefault((i, kind), {})[head[-6]] = tensor
            else:
                made[f"transformer.resblocks.{i}.{_swap(rest, OPEN_CLIP)}"] = tensor
    for (i, kind), parts in three.items():
        made[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(
            [parts[letter] for letter in "qkv"]
        )
    made["token_embedding.weight"] = state["embeddings.token_embedding.weight"]
    made["positional_embedding"] = state["embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        made[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
    if "text_projection.weight" in state:
        made["text_projection"] = state["text_projection.weight"].T
    last = sum("attn.in_proj_weight" in name for name in made)
    for name in [n for n in made if n.startswith("transformer.resblocks.0.")] * bool(more):
        made[name.replace(".0.", f".{last}.", 1)] = torch.randn_like(made[name])
    made["logit_scale"] = torch.zeros(())
    return {prefix + name: tensor for name, tensor in made.items()}


def single(pipe, version):
    """Return a pipeline's weights as a single file holds them."""
    made = original_unet(pipe.unet.state_dict()) | original_autoencoder(pipe.vae.state_dict())
    made["alphas_cumprod"] = torch.zeros(1000)  # buffers of the training code are left out
    if version == "2":
        made |= original_open_clip(pipe.text_encoder, "cond_stage_model.model.", more=1)
        return {name: tensor.contiguous().clone() for name, tensor in made.items()}
    prefix = {"1": "cond_stage_model.transformer.", "XL": "conditioner.embedders.0.transformer."}
    for name, tensor in pipe.text_encoder.state_dict().items():
        made[f"{prefix[version]}text_model.{name.removeprefix('text_model.')}"] = tensor
    if version == "XL":
        made |= original_open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return {name: tensor.contiguous().clone() for name, tensor in made.items()}
