"""Words obeyed: do pictures drawn by text show what the text says, and what no picture has shown?

Ho & Salimans (2021), Rombach et al. (2022): with classifier-free guidance a model follows its text
more closely, at the cost of variety. Compositionality is the harder half: a model that has seen red
apples and blue hearts should draw blue apples.

A model of `benchmarks/emoji_text.py`'s pictures draws, at each guidance,

- the captions of held-out test pictures: the share whose own caption CLIP finds first, and among
  five, of all the different ones (a run of the recipe `clip`); the share whose category a run of
  the recipe `classifier` tells; FD-Lite0 to the test pictures. Real pictures under the same
  captions bound what can be reached, and the right caption by chance is one in as many as there
  are;
- "COLOUR THING" for pairs that training pictures show and for pairs that none shows: the share in
  which the colour asked for is one of the two that fill most of the drawing.

The picture is a grid of prompts.

    python benchmarks/emoji_text.py FOLDER --out runs/emoji-text
    trilemma train text-diffusion --data runs/emoji-text --size 32 --out runs/emoji
    trilemma train clip --data runs/emoji-text --size 32 --out runs/clip
    trilemma train classifier --data runs/emoji-text --size 32 --out runs/classifier
    python benchmarks/claims/words.py --run runs/emoji --clip runs/clip --classifier runs/classifier
"""

import json
import sys
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F

import trilemma
from trilemma import data as pictures
from trilemma.batch import to_float
from trilemma.drawing import captioned
from trilemma.metrics.retrieval import recalls
from trilemma.sampling import Trained

sys.path.insert(0, str(Path(__file__).parents[1]))
from emoji_text import colours_of  # noqa: E402

PROMPTS = [
    "red apple", "green apple", "blue apple", "purple banana",
    "red heart", "blue heart", "green heart", "pink star",
    "cat face", "blue cat face", "grinning face", "red grinning face",
    "a yellow car", "purple house", "flag", "fruit",
]  # fmt: skip


def found(clip: Trained, images: torch.Tensor, texts: list[str]) -> list[float]:
    """Return the shares of pictures whose own text is the nearest, and among the five nearest."""
    different = list(dict.fromkeys(texts))
    own = torch.tensor([different.index(text) for text in texts])
    with torch.no_grad():
        told = torch.cat([clip.model.embed_texts(different[i : i + 128])
                          for i in range(0, len(different), 128)])  # fmt: skip
        seen = torch.cat([clip.model.embed_images(to_float(part)) for part in images.split(128)])
    return recalls(seen @ told.T, F.one_hot(own, len(different)).bool(), (1, 5))


def told(judge: Trained, images: torch.Tensor, label: np.ndarray) -> float:
    """Return the share of pictures of which the classifier tells the category."""
    with torch.no_grad():
        parts = [judge.model.logits(to_float(p), torch.zeros(len(p))) for p in images.split(128)]
    return (torch.cat(parts).argmax(1).numpy() == label).mean()


def obeyed(images: torch.Tensor, colours: list[str]) -> float:
    """Return the share of pictures in which the colour is one of the two that fill most of it."""
    right = 0
    for image, colour in zip(images, colours, strict=True):
        drawing = image.permute(1, 2, 0).numpy()
        solid = np.where((drawing < 245).any(2), 255, 0).astype(np.uint8)  # the paper left out
        if solid.any():
            right += colour in colours_of(np.dstack([drawing, solid]))
    return right / len(images)


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument("--run", required=True, help="a model that draws by text")
    parser.add_argument("--clip", help="a run of the recipe clip")
    parser.add_argument("--classifier", help="a run of the recipe classifier")
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-text"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--pairs", type=int, default=200, help="things and colours of each kind")
    given = parser.parse_args()
    trained = trilemma.load(given.run)
    clip = given.clip and trilemma.load(given.clip)
    judge = given.classifier and trilemma.load(given.classifier)
    side = trained.data["shape"][1]
    test, train = (pictures.load(given.data, split=part, size=side) for part in ("test", "train"))
    texts = test.condition(slice(None)).text
    distance = common.Distance(test)

    unseen = json.loads((given.data / "unseen.json").read_text())
    order = np.random.default_rng(0).permutation(len(unseen))[: given.pairs]
    new = [unseen[i] for i in order]
    lines = [json.loads(line) for line in (given.data / "metadata.jsonl").read_text().splitlines()]
    shown = [line["text"][0].partition(" ")[::2] for line in lines
             if Path(line["file_name"]).stem.rpartition("-")[2].islower()]  # fmt: skip
    order = np.random.default_rng(0).permutation(len(shown))[: given.pairs]
    old = [shown[i][::-1] for i in order]

    def measures(images: torch.Tensor) -> list[str]:
        cells = [f"{distance(images):.0f}"]
        cells += [f"{share:.1%}" for share in found(clip, images, texts)] if clip else ["-", "-"]
        return cells + [f"{told(judge, images, test.label):.1%}" if judge else "-"]

    real = torch.from_numpy(np.array(test.images))
    some = np.linspace(0, len(train) - 1, len(test)).astype(np.int64)
    rows = [["real test pictures", *measures(real), "-", "-"]]
    rows[0][1] = f"{distance(train.tensor(some)):.0f} (training pictures)"
    for scale in given.guidance:
        drawn = trained.sample(len(texts), text=texts, guidance=scale)
        cells = [f"guidance {scale:g}", *measures(drawn)]
        for pairs in (old, new):
            asked = [f"{colour} {thing}" for thing, colour in pairs]
            images = trained.sample(len(asked), text=asked, guidance=scale)
            cells.append(f"{obeyed(images, [colour for _, colour in pairs]):.1%}")
        rows.append(cells)
        common.tell(cells[0], seen=trained.progress["seen"])
    given.out.mkdir(parents=True, exist_ok=True)
    prompts = [text for text in PROMPTS for _ in range(4)]
    captioned(trained.sample(len(prompts), text=prompts), prompts, 8).save(given.out / "words.png")
    common.publish(
        f"{trained.name} after {trained.progress['seen']:,} images; {len(texts)} captions of test "
        f"pictures, {len(dict.fromkeys(texts))} different; {given.pairs} pairs of each kind.",
        ("pictures", "FD-Lite0", "own caption first", "among five", "category told",
         "colour of seen pairs", "of unseen pairs"),
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
