"""Speed of Stable Diffusion 1.5's U-Net: ours against diffusers', with random weights.

One guided evaluation: latents of a picture, twice in a batch, under 77 tokens. The sides take turns
in one process, round by round; the median round is shown, and how far outputs are apart. All three
together hold about 7 GiB. Where bfloat16 does not pay, ours runs in float32, as it would.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/stable_speed.py
    python benchmarks/stable_speed.py --tiny --rounds 1        # does it run?
"""

import argparse
import statistics
import time

import diffusers
import torch
from diffusers import UNet2DConditionModel

from trilemma import device
from trilemma.networks.layers import Embedded
from trilemma.networks.spatial_unet import SpatialUNet
from trilemma.stable import configs, loading

WHERE = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=512, help="of the picture")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds not counted")
    parser.add_argument("--tiny", action="store_true", help="a network of a tenth of the widths")
    args = parser.parse_args()

    torch.manual_seed(0)
    widths = (32, 64, 128, 128) if args.tiny else (320, 640, 1280, 1280)
    told = dict(block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8)
    full = UNet2DConditionModel(**told).eval().requires_grad_(False)
    device.prepare(torch.nn.Identity(), WHERE, torch.float32)  # the process's own settings, for all
    kind = device.dtype("auto", WHERE)
    with torch.device("meta"):
        ours = SpatialUNet(**configs.unet(dict(full.config), "unet"))
        half = UNet2DConditionModel(**told).eval().requires_grad_(False)
    halved = {name: tensor.bfloat16() for name, tensor in full.state_dict().items()}
    half.load_state_dict(halved, assign=True)
    loading.fill(ours, full.state_dict() if kind == torch.float32 else halved, "unet", WHERE, kind)

    side = args.size // 8
    x, text, t = torch.randn(2, 4, side, side), torch.randn(2, 77, 768), torch.tensor(501)
    time_of = torch.full((2,), 502 / 1000, dtype=torch.float64)

    def run_ours() -> torch.Tensor:
        with device.autocast(kind, WHERE):
            given = x.contiguous(memory_format=torch.channels_last)
            return ours(given, time_of, Embedded(tokens=text))

    sides = {
        "diffusers, its defaults": lambda: full(x, t, text).sample,
        "diffusers, bf16": lambda: half(x.bfloat16(), t, text.bfloat16()).sample.float(),
        f"ours, {str(kind).removeprefix('torch.')}": run_ours,
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    out: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for turn in range(-args.warmup, args.rounds):
            for name, run in sides.items():
                start = time.perf_counter()
                out[name] = run()
                if turn >= 0:
                    took[name].append(time.perf_counter() - start)
    first = next(iter(sides))
    print(
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}; {sum(p.numel() for p in ours.parameters()) / 1e6:.0f} M "
        f"parameters, 2 x 4 x {side} x {side}, median of {args.rounds} rounds"
    )
    print("\n| | s an evaluation | ratio | from the first, relative |\n|---|---|---|---|")
    for name in sides:
        seconds = statistics.median(took[name])
        far = (out[name] - out[first]).norm() / out[first].norm()
        ratio = statistics.median(took[first]) / seconds
        print(f"| {name} | {seconds:.2f} | {ratio:.2f} | {far:.1e} |")


if __name__ == "__main__":
    main()
