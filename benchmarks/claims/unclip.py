"""Claim 17: CLIP's embedding of a picture, drawn by a prior, is a better way from words to pictures
than CLIP's embedding of the words.

Ramesh et al. (2022), "Hierarchical Text-Conditional Image Generation with CLIP Latents", section
5.1 and figure 8: the decoder of unCLIP can be given the text's embedding in the picture's place,
for CLIP puts both into one space; what a prior draws of the text is better.

The captions of held-out pictures, which no training picture shows, are drawn by the decoder from
the text's own embedding, from what each prior draws of it, and from the embeddings of the held-out
pictures themselves, which bounds what a prior can reach. FD-Lite0 to these pictures; the share
whose own caption the model's CLIP finds first, and among five; the share whose category a run of
`classifier` tells, which has nothing to do with CLIP; and how near the embeddings given to the
decoder come to the text's and to the picture's own, as cosines.

The picture shows pictures and their variations, ways from one picture to another, changes by words,
and prompts drawn directly and by the prior.

    trilemma train clip --data runs/emoji-text --size 32 --out runs/clip
    trilemma train classifier --data runs/emoji-text --size 32 --out runs/classifier
    trilemma train unclip-decoder --data runs/emoji-text --size 32 --out runs/unclip-decoder
    trilemma train unclip-prior --data runs/emoji-text --size 32 --out runs/unclip-prior
    trilemma join --prior runs/unclip-prior --decoder runs/unclip-decoder --out runs/unclip
    python benchmarks/claims/unclip.py --run runs/unclip --classifier runs/classifier

Refuted if pictures by the prior are not nearer than direct ones to the held-out pictures, or if the
category is told of fewer of them.
"""

from collections.abc import Sequence
from dataclasses import replace

import common
import numpy as np
import torch
from matplotlib import pyplot
from words import found, told

import trilemma
from trilemma import data as pictures
from trilemma import variation
from trilemma.batch import Condition, Rng, to_uint8
from trilemma.edit import inference
from trilemma.models.unclip import DiffusionPrior, UnCLIP, clip_of
from trilemma.sampling import Trained

BATCH = 128
PROMPTS = ["red apple", "blue heart", "cat face", "grinning face", "flag", "yellow car"]
CHANGES = [("red heart", "blue heart"), ("face", "cat face")]
SHARES = "first", "five", "category"
TINY = {"n": 6, "steps": 2, "shown": 2}


def embeddings(unclip: Trained, texts: Sequence[str], scale: float | None) -> torch.Tensor:
    """Return (N, D) for texts: their own embeddings if `scale` is None, else what the prior draws.

    `scale` is that of the prior's guidance, which an autoregressive one does not know.
    """
    model: UnCLIP = unclip.model
    diffusion = isinstance(model.prior.module, DiffusionPrior)
    options = {"guidance": scale, "steps": 20} if diffusion else {}
    drawn = []
    with inference(unclip) as where:
        for first in range(0, len(texts), BATCH):
            some = list(texts[first : first + BATCH])
            if scale is None:
                drawn.append(clip_of(model).embed_texts(some))
            else:
                noise = Rng(torch.arange(first, first + len(some)), where)
                told = Condition(len(some), text=some)
                drawn.append(model.prior.module.draw(told, noise, **options))
    return torch.cat(drawn).float().cpu()


def decoded(unclip: Trained, z: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """Return pictures, uint8 (N, C, H, W), of embeddings (N, D)."""
    drawn = []
    with inference(unclip) as where:
        for first in range(0, len(z), BATCH):
            some = z[first : first + BATCH].to(where)
            noise = Rng(torch.arange(first, first + len(some)), where)
            told = replace(Condition(len(some)), embedding=some)
            options = {"steps": steps, "guidance": guidance}
            drawn.append(to_uint8(unclip.model.decoder.module.sample(told, noise, **options)).cpu())
    return torch.cat(drawn)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--run", required=True, help="of what trilemma join made")
    parser.add_argument("--classifier", help="a run of the recipe classifier")
    parser.add_argument("--data", default="runs/emoji-text")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0], help="of the decoder")
    parser.add_argument("--prior-guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--steps", type=int, default=20, help="of the decoder")
    parser.add_argument("--n", type=int, default=464, help="captions of test pictures, at most")
    parser.add_argument("--shown", type=int, default=6, help="pictures that are varied")
    given = common.parse(parser, TINY, argv)
    unclip = trilemma.load(given.run)
    judge = given.classifier and trilemma.load(given.classifier)
    clip = replace(unclip, model=clip_of(unclip.model), path=None)
    side = unclip.data["shape"][1]
    test = pictures.load(given.data, split="test", size=side)
    distance = common.Distance(test, given.features, given.reference)
    kept = common.Kept("unclip", given)
    rows = np.arange(min(given.n, len(test)))
    texts = test.condition(rows).text
    real = test.tensor(rows)
    label = None if test.label is None else test.label[rows]

    own = {"pictures": variation.embed(unclip, real).float()}
    own["direct"] = embeddings(unclip, texts, None)
    titles = {"direct": "the text's embedding"}
    for scale in given.prior_guidance:
        own[f"prior, {scale:g}"] = embeddings(unclip, texts, scale)
        titles[f"prior, {scale:g}"] = f"the prior's, drawn at guidance {scale:g}"
    titles["pictures"] = "the picture's own"

    def measures(images: torch.Tensor) -> dict[str, float]:
        first, five = found(clip, images, texts)
        said = {"fd": distance(images), "first": first, "five": five}
        if judge:
            said["category"] = float(told(judge, images, label))
        return said

    def cells(said: dict[str, float]) -> list[str]:
        shares = [f"{said[key]:.1%}" if key in said else "" for key in SHARES]
        return [f"{said['fd']:.0f}", *shares]

    table = [("test pictures", "", "", "", *cells(kept("test pictures", lambda: measures(real))))]
    for way, title in titles.items():
        cosines = {
            "text": float((own[way] * own["direct"]).sum(1).mean()),
            "picture": float((own[way] * own["pictures"]).sum(1).mean()),
        }
        near = kept(f"{way}, cosines", lambda cosines=cosines: cosines)
        for scale in given.guidance:
            said = kept.draw(
                f"{way}, guidance {scale:g}",
                lambda way=way, scale=scale: decoded(unclip, own[way], given.steps, scale),
                measures,
            )
            table.append(
                (title, f"{scale:g}", f"{near['text']:.2f}", f"{near['picture']:.2f}", *cells(said))
            )

    figure, axes = pyplot.subplots(1, 4, figsize=(14, 4), layout="constrained")
    some = real[torch.linspace(0, len(real) - 1, given.shown).long()]
    varied = variation.variations(unclip, some, 5, steps=given.steps)
    strip = torch.cat([some[:, None], varied], 1).flatten(0, 1)
    common.show(axes[0], strip, "pictures, and five variations of each", 6)
    ways = variation.blend(unclip, some, some.roll(-1, 0), 6, steps=given.steps)
    common.show(axes[1], ways.flatten(0, 1), "from one picture to the next", 6)
    prompts = [text for text in PROMPTS for _ in range(3)]
    halves = []
    for scale in (None, max(given.prior_guidance)):
        z = embeddings(unclip, prompts, scale)
        drawn = decoded(unclip, z, given.steps, max(given.guidance))
        halves.append(drawn.unflatten(0, (len(PROMPTS), 3)))
    both = torch.cat(halves, 1).flatten(0, 1)
    common.show(axes[2], both, "by words: three direct, three by the prior", 6)
    changed = [
        variation.change(unclip, some[: given.shown // 2], *words, n=6, steps=given.steps)
        for words in CHANGES
    ]
    title = "; ".join(f"'{before}' to '{after}'" for before, after in CHANGES)
    common.show(axes[3], torch.cat(changed).flatten(0, 1), title, 6)
    kept.save(given.out, figure)
    common.publish(
        f"{unclip.progress['seen']:,} images of training of the decoder; {len(rows)} captions of "
        f"test pictures, {len(dict.fromkeys(texts))} different; {given.steps} decoder steps.",
        ("the decoder is given", "guidance", "cosine to the text", "to the picture", "FD-Lite0",
         "own caption first", "among five", "category told"),
        table,
    )  # fmt: skip


if __name__ == "__main__":
    main()
