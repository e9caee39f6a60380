"""The report: what it says, that it stands alone, and that a real browser shows it whole."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from trilemma import report as reports
from trilemma.report import choice, figures, scales, sheets

NAMES = [
    "quick-vae",
    "quick-gan",
    "quick-diffusion",
    "flow-matching",
    "wgan-gp",
    "ddpm",
    "ae",
    "x" * 40,
]
# Fréchet distance, coverage, pictures per second
MEASURED = [
    (612.0, 0.44, 12_300.0), (380.0, 0.31, 8_450.0), (148.0, 0.78, 88.0), (181.0, 0.77, 35.0),
    (540.0, 0.36, 8_100.0), (420.0, 0.51, 1.2), (1900.0, 0.02, 12_900.0), (250.0, 0.6, 420.0),
]  # fmt: skip


def shapes(n, size, seed):
    """Blurred discs and boxes: pictures enough for a page."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    images = []
    for _ in range(n):
        cx, cy, r = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.3)
        d = np.hypot(x - cx, y - cy) if rng.random() < 0.5 else np.maximum(abs(x - cx), abs(y - cy))
        images.append(255 / (1 + np.exp((d - r) * 40)))
    return torch.tensor(np.stack(images)).to(torch.uint8)[:, None]


def example(folder, count=3, failed=()):
    """Return a realistic report of `count` models, its images in `folder`."""
    columns = [
        "top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "trainer",
        "bag",
        "boot",
    ]
    sheets.save(shapes(60, 28, 0), 10, folder / "images" / "real.png")
    models = []
    for i in range(count):
        fd, coverage, speed = MEASURED[i]
        name, steps = NAMES[i], [5, 10, 20, 50] if i in (2, 3) else []
        sheets.save(shapes(60, 28, i + 1), 10, folder / "images" / f"{i}-samples.png")
        sheets.save(shapes(24, 28, i + 90), 4, folder / "images" / f"{i}-near.png", lead=True)
        models.append({
            "name": name, "recipe": name, "family": "a family", "summary": "what it is", "paper": "",
            "training": {"seconds": 180.0, "images": 61_000 * (i + 1), "steps": 480 * (i + 1),
                         "images_per_second": 61_000 * (i + 1) / 180},
            "scores": {"fd": fd, "kd": fd / 9, "sfd": fd * 1.4, "swd": fd / 70, "precision": 0.6,
                       "recall": coverage - 0.02, "density": 0.7, "coverage": coverage,
                       "inception_score": 4.2, "memorised": 0.003},
            "noise": {"fd": fd / 60, "coverage": 0.012, "precision": 0.01, "recall": 0.01},
            "speed": {"images_per_second": speed, "calls": 20 if steps else 1,
                      "parameters": 3_100_000, "memory": 210e6},
            "probes": [
                {"seconds": 45.0 * k, "fd": 90 + fd * (0.9 + 1.6 * math.exp(1 - k)),
                 "coverage": coverage * (1 - 0.6**k)} for k in range(1, 5)
            ],
            "steps": [{"steps": s, "calls": s, "fd": 90 + fd * (0.95 + 3 / s), "coverage": 0.7 - 1 / s,
                       "images_per_second": speed * 20 / s} for s in steps],
            "sheet": {"path": f"images/{i}-samples.png", "alt": f"60 pictures drawn by {name}"},
            "neighbours": {"path": f"images/{i}-near.png", "alt": f"neighbours of {name}",
                           "note": "0.3 % of 2,000 pictures lie nearer than held-out ones do."},
            "protocol": {"sampling": {"solver": "dpmpp_2m", "steps": 20} if steps else "one pass"},
            "commands": [{"what": "Train on", "command": f"trilemma train {name} --data fashion"}],
        })  # fmt: skip
    made = {
        "schema": reports.SCHEMA, "trilemma": "0.1.0", "created": "2025-11-29 10:20",
        "title": "quick-diffusion draws best and covers most; quick-vae is fastest",
        "request": {"recipes": NAMES[:count], "equal": "time", "budget": 180.0, "images": None,
                    "seed": 0, "n": 2000, "probes": 4, "probe_n": 500},
        "machine": {"device": "cpu", "processor": "a processor", "threads": 2, "torch": "2.13.0"},
        "data": {"name": "fashion", "fingerprint": "abc123", "shape": [1, 28, 28], "count": 10_000,
                 "test_count": 2000, "label_names": columns, "columns": columns,
                 "sheet": {"path": "images/real.png", "alt": "60 real pictures"},
                 "sheet_note": "the same seeds for every model, a column for each class."},
        "protocol": {"distance": "FD-Lite0", "kernel": "KID-Lite0", "n": 2000,
                     "neighbour_note": "Near in the feature space of lite0.",
                     "shared": {"features": "lite0", "weights": "0123456789abcdef", "n": 2000}},
        "reference": {"fd": 50.2, "kd": 0.4, "precision": 0.93, "recall": 0.92, "density": 1.0,
                      "coverage": 0.95, "memorised": 0.05, "probe": {"fd": 131.0, "coverage": 0.8}},
        "models": models,
        "failed": [{"name": name, "error": "the loss <b>is</b> not finite"} for name in failed],
        "commands": [{"what": "See it again", "command": "trilemma compare ..."}],
    }  # fmt: skip
    made["choice"] = choice.choose(made) if models else {}
    return made
