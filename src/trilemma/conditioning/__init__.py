"""From what is asked of a picture (Condition) to what a network reads (Embedded).

With a probability `dropout` a training image's condition is replaced by "nothing said", so that
one network learns the conditional and the unconditional distribution: Ho & Salimans 2021,
"Classifier-Free Diffusion Guidance", algorithm 1.

- Labels: a learned vector for each class, joined to the time (Dhariwal & Nichol 2021).
- LabelChannels: labels as constant channels beside the picture (Mirza & Osindero 2014).
- Attributes: a linear map of several yes or no.
- Source: another picture beside the noisy one, as channels: a small one for super-resolution
  (Saharia et al. 2022, "Image Super-Resolution via Iterative Refinement"), a grey one for
  colourisation, one with a hole for inpainting (Saharia et al. 2022, "Palette").
- Text: captions, by a transformer that learns with the model, or a pretrained one; as
  tokens to attend to (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion
  Models", section 3.3) and as a vector, joined to the time (Podell et al. 2023, "SDXL",
  section 2.1).
- ClipText, ClipImage: what a trained CLIP says of words, and of a picture (Ramesh et al. 2022,
  "Hierarchical Text-Conditional Image Generation with CLIP Latents").
- Together: several of these.
"""

from __future__ import annotations

from trilemma.conditioning.base import Conditioner, Together
from trilemma.conditioning.clip import ClipImage, ClipText, reads_text
from trilemma.conditioning.labels import Attributes, LabelChannels, Labels
from trilemma.conditioning.pretrained import Pretrained
from trilemma.conditioning.source import (
    SOURCES,
    Source,
    grey,
    masked,
    random_masks,
    shrink,
    source_of,
)
from trilemma.conditioning.text import Text

__all__ = [
    "Attributes",
    "ClipImage",
    "ClipText",
    "Conditioner",
    "LabelChannels",
    "Labels",
    "Pretrained",
    "SOURCES",
    "Source",
    "Text",
    "Together",
    "grey",
    "masked",
    "random_masks",
    "reads_text",
    "shrink",
    "source_of",
]
