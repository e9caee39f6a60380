"""Speed of Stable Diffusion 1.5 with random weights: ours against diffusers', and ours accelerated.

unet           one guided evaluation: latents of a picture, under 77 tokens for and 77 against.
               diffusers in float32, which is its default, in bfloat16, and ours, by turns; the
               median round, and how far outputs are apart.
picture        a picture of 20 steps at default settings, from text to pixels, by turns.
accelerations  12 steps by ours, plain and with each of what `trilemma sample` can leave out, once
               each; how far the latents are from those of the plain one. Decoding, which is the
               same for all, is left out of the time. Random weights tell the time; what is lost
               is told with --checkpoint only, by a real one.

Everything is in one process and holds about 8 GiB. Where bfloat16 does not pay, ours runs in
float32, as it would.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/stable_speed.py --only unet
    python benchmarks/stable_speed.py --only picture
    python benchmarks/stable_speed.py --only accelerations
    python benchmarks/stable_speed.py --tiny --rounds 1 --size 64 --steps 4     # does it run?
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from trilemma import device
from trilemma.batch import Rng
from trilemma.networks.kl_autoencoder import KLAutoencoder
from trilemma.networks.layers import Embedded
from trilemma.stable import configs, keys, load, loading, packing, text
from trilemma.stable.pipeline import StableDiffusion
from trilemma.stable.schedule import from_config

WHERE = torch.device("cpu")
TEXT = "a lighthouse at dawn, oil on canvas"
FASTER = {
    "guidance_interval 0.5,5": {"guidance_interval": (0.5, 5)},
    "reuse_blocks 2": {"reuse_blocks": 2},
    "reuse_blocks 3": {"reuse_blocks": 3},
    "merge_tokens 0.5": {"merge_tokens": 0.5},
    "all: 0.5,5; 3; 0.5": {
        "guidance_interval": (0.5, 5),
        "reuse_blocks": 3,
        "merge_tokens": 0.5,
    },
}


def pipeline(tiny: bool) -> StableDiffusionPipeline:
    """Return diffusers' pipeline of random weights, in float32."""
    torch.manual_seed(0)
    widths = (32, 64, 128, 128) if tiny else (320, 640, 1280, 1280)
    coder = (32, 32, 64, 64) if tiny else (128, 256, 512, 512)
    words = text.own_tokenizer()
    words.model_max_length = 77
    told = dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=1 if tiny else 12,
        num_attention_heads=12,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    parts = dict(
        unet=UNet2DConditionModel(
            block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8
        ),
        vae=AutoencoderKL(
            block_out_channels=coder,
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **told)),
    )
    for part in parts.values():
        part.eval().requires_grad_(False)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    made = StableDiffusionPipeline(
        tokenizer=words,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made


def ours(pipe: StableDiffusionPipeline, size: int) -> StableDiffusion:
    """Return ours of the same weights, as `trilemma sample` would open it."""
    kind = device.dtype("auto", WHERE)
    told = configs.unet(dict(pipe.unet.config), "unet")
    unet = load.unet(told, pipe.unet.state_dict(), "unet", WHERE, kind)
    with torch.device("meta"):
        coder = KLAutoencoder(**configs.autoencoder(dict(pipe.vae.config), "vae"))
    loading.fill(coder, keys.autoencoder(pipe.vae.state_dict()), "vae", WHERE, kind)
    if packing.pays(WHERE, kind):
        packing.pack(unet)
    config, weights = pipe.text_encoder.config.to_dict(), pipe.text_encoder.state_dict()
    tower = text.Tower(pipe.tokenizer, text.encoder(config, weights, "text", WHERE, kind))
    spacing = from_config(
        {**pipe.scheduler.config, "_class_name": "PNDMScheduler"}, "the scheduler"
    )
    reader = text.Reader([tower], inner=False)
    return StableDiffusion(unet, coder, reader, spacing, size, False, kind, WHERE)


def by_turns(
    sides: dict[str, Callable[[], Tensor]], warmup: int, rounds: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return each side's median seconds and its output."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    out = {}
    with torch.inference_mode():
        for turn in range(-warmup, rounds):
            for name, run in sides.items():
                start = time.perf_counter()
                out[name] = run()
                if turn >= 0:
                    took[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in took.items()}, out


def evaluation(args: argparse.Namespace) -> None:
    pipe = pipeline(args.tiny)
    stable, full = ours(pipe, args.size), pipe.unet
    with torch.device("meta"):
        half = UNet2DConditionModel.from_config(full.config).eval().requires_grad_(False)
    halved = {name: tensor.bfloat16() for name, tensor in full.state_dict().items()}
    half.load_state_dict(halved, assign=True)
    side = args.size // 8
    x, words, t = torch.randn(1, 4, side, side), torch.randn(2, 77, 768), torch.tensor(501)
    time_of = torch.full((1,), 502 / 1000, dtype=torch.float64)
    twice = torch.cat([x, x])

    def run_ours() -> Tensor:
        with device.autocast(stable.kind, WHERE):
            given = x.contiguous(memory_format=torch.channels_last)
            return stable.unet(given, time_of, Embedded(tokens=words))

    name = f"ours, {str(stable.kind).removeprefix('torch.')}"
    first, second = "diffusers, its defaults", "diffusers, bfloat16"
    took, out = by_turns(
        {
            first: lambda: full(twice, t, words).sample,
            second: lambda: half(twice.bfloat16(), t, words.bfloat16()).sample.float(),
            name: run_ours,
        },
        args.warmup,
        args.rounds,
    )
    print(f"\none guided evaluation, 2 x 4 x {side} x {side}, median of {args.rounds} rounds\n")
    print("| | s | times as fast | from the first, relative |\n|---|---|---|---|")
    for each, seconds in took.items():
        far = (out[each] - out[first]).norm() / out[first].norm()
        print(f"| {each} | {seconds:.2f} | {took[first] / seconds:.2f} | {far:.1e} |")
    target(took[first] / took[name], 2, "as fast as diffusers' defaults")
    target(took[second] / took[name], 1.25, "as fast as its bfloat16")


def picture(args: argparse.Namespace) -> None:
    pipe = pipeline(args.tiny)
    stable, asked = ours(pipe, args.size), args.steps or 20

    def theirs(steps: int = asked) -> Tensor:
        size = {"height": args.size, "width": args.size}
        return pipe(TEXT, num_inference_steps=steps, output_type="pt", **size).images

    def run_ours(steps: int = asked) -> Tensor:
        return stable.draw([TEXT], Rng([0]), steps=steps)

    theirs(1), run_ours(1)  # whose first use of each kernel does not count
    sides = {"diffusers, its defaults": theirs, "ours": run_ours}
    took, _ = by_turns(sides, 0, args.rounds)
    first, second = took.values()
    print(f"\na picture, {args.size} x {args.size}, {asked} steps, once each\n")
    print("| | s | times as fast |\n|---|---|---|")
    for name, seconds in took.items():
        print(f"| {name} | {seconds:.1f} | {first / seconds:.2f} |")
    target(first / second, 2.5, "as fast end to end")


def accelerations(args: argparse.Namespace) -> None:
    if args.checkpoint is None:
        stable = ours(pipeline(args.tiny), args.size)
    else:
        stable = load.load(args.checkpoint, "cpu")

    unread = SimpleNamespace(  # in place of the autoencoder: nothing is decoded
        factor=stable.autoencoder.factor,
        latent=stable.autoencoder.latent,
        decode=lambda latent, bands: latent,
    )
    stable, asked = stable.with_autoencoder(unread), args.steps or 12

    def run(options: dict[str, Any], steps: int = asked) -> Tensor:
        kept: list[Tensor] = []
        told = {"height": args.size, "width": args.size, "steps": steps, **options}
        stable.draw([TEXT], Rng([0]), watch=lambda _, x0: kept.append(x0), **told)
        return kept[-1]

    sides = {name: partial(run, options) for name, options in {"plain": {}, **FASTER}.items()}
    for side in sides.values():
        side(1)  # the first use of each kernel does not count
    took, latents = by_turns(sides, 0, 1)
    exact = latents["plain"]
    said = "random weights" if args.checkpoint is None else args.checkpoint
    print(
        f"\na picture, {args.size} x {args.size}, {asked} steps, {said}, not decoded, median of "
        f"{args.rounds} rounds\n"
    )
    print("| | s | times as fast | latents: relative error | PSNR, dB |\n|---|---|---|---|---|")
    for name, seconds in took.items():
        error = latents[name] - exact
        far, mean = float(error.norm() / exact.norm()), float(error.square().mean())
        span = float(exact.max() - exact.min())
        psnr = 20 * math.log10(span) - 10 * math.log10(mean) if mean else math.inf
        faster = took["plain"] / seconds
        print(f"| {name} | {seconds:.1f} | {faster:.2f} | {far:.3f} | {psnr:.1f} |")


def target(found: float, sought: float, what: str) -> None:
    print(f"\n{found:.2f} times {what}; target {sought}: {'yes' if found >= sought else 'NO'}")


PARTS = {"unet": evaluation, "picture": picture, "accelerations": accelerations}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part; all if not said")
    parser.add_argument("--size", type=int, default=512, help="of the picture")
    parser.add_argument("--steps", type=int, help="of a picture: 20, or 12 where it is accelerated")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds not counted")
    parser.add_argument("--checkpoint", help="to draw accelerations with")
    parser.add_argument("--tiny", action="store_true", help="networks of a tenth of the widths")
    args = parser.parse_args()
    device.prepare(torch.nn.Identity(), WHERE, torch.float32)  # the process's settings, for all
    print(
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}"
    )
    for name, part in PARTS.items():
        if args.only in (None, name):
            part(args)


if __name__ == "__main__":
    main()
