"""The report: what it says, that it stands alone, and that a real browser shows it whole."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

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
            "name": name, "recipe": name, "conditional": i != 4, "family": "a family",
            "summary": "what it is", "paper": "",
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
            "steps": [{"steps": s, "calls": s, "fd": 90 + fd * (0.95 + 3 / s),
                       "coverage": 0.7 - 1 / s,
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
        "judging": {"asked": 2000, "bound": 300.0, "foreseen": {}, "note": ""},
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


class Page(HTMLParser):
    """Collects what a page shows and asks for."""

    VOID = {"meta", "link", "img", "br", "hr", "path", "circle", "polygon"}

    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.tags, self.open, self.text = [], [], set(), [], []
        self.headings = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.links += [attrs[k] for k in ("src", "href", "action", "srcset", "data") if k in attrs]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8])
def test_page_stands_alone(tmp_path, count):
    made = example(tmp_path, count, failed=["cyclegan"])
    written = reports.write(made, tmp_path)
    text = written.read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags and "iframe" not in page.tags
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"url\(|@import|javascript:|\son\w+=", text)
    assert len(page.images) == (2 * count + 1 if count else 0)
    for image in page.images:
        kind, _, code = image["src"].partition(",")
        assert kind == "data:image/png;base64" and len(image["alt"]) > 5
        with Image.open(io.BytesIO(base64.b64decode(code, validate=True))) as decoded:
            decoded.load()
            assert [str(s) for s in decoded.size] == [image["width"], image["height"]]
    steps = np.diff(page.headings)
    assert page.headings[0] == 1 and (steps <= 1).all(), "a heading level is left out"
    said = " ".join(page.text)
    for name in [*NAMES[:count], "cyclegan", "the loss <b>is</b> not finite"]:
        assert name in said
    assert (tmp_path / "trilemma.png").exists() == bool(count)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == made


def test_page_is_a_pure_function_of_report_and_images(tmp_path):
    first = reports.write(example(tmp_path), tmp_path).read_text("utf-8")
    again = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert reports.render(again, tmp_path) == first


def test_newer_report_is_refused(tmp_path):
    made = example(tmp_path, 1) | {"schema": reports.SCHEMA + 1}
    with pytest.raises(ValueError, match="schema"):
        reports.render(made, tmp_path)


def test_names_are_escaped(tmp_path):
    made = example(tmp_path, 2)
    made["models"][0]["name"] = '<script>alert("x")</script>'
    made["choice"] = choice.choose(made)
    page = Page(reports.render(made, tmp_path))
    assert "script" not in page.tags


def test_every_number_is_in_the_table(tmp_path):
    made = example(tmp_path)
    said = " ".join(Page(reports.render(made, tmp_path)).text)
    for text in ("612", "380", "148", "44 %", "12,300", "88", "3.1 M", "FD-Lite0", "KID-Lite0"):
        assert text in said
    for protocol in ("0123456789abcdef", "dpmpp_2m"):
        assert protocol in said


def test_fewer_pictures_than_asked_for_are_told(tmp_path):
    made = example(tmp_path, 2)
    assert "asked for" not in " ".join(Page(reports.render(made, tmp_path)).text)
    made["judging"]["note"] = "Every model is judged by 700 pictures, not the 2,000 asked for."
    made["protocol"]["n"] = 700
    said = " ".join(Page(reports.render(made, tmp_path)).text)
    assert made["judging"]["note"] in said and "judged by 700 drawn pictures" in said
    assert "scoring 700 drawn pictures" in said and "distances too large and rough" in said


def browse(page, width, script, folder):
    """Run `script` over WebDriver in headless Chromium; return its result and the console."""
    port_line = "was started successfully on port "
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        line = next(text for text in driver.stdout if port_line in text)
        base = f"http://127.0.0.1:{line.split(port_line)[1].strip().rstrip('.')}/session"

        def ask(method, path, body=None):
            data = None if body is None else json.dumps(body).encode()
            request = Request(base + path, data, {"Content-Type": "application/json"})
            request.method = method
            with build_opener(ProxyHandler({})).open(request) as answer:
                return json.load(answer)["value"]

        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
        ]  # fmt: skip
        wanted = {
            "goog:chromeOptions": {
                "args": flags,
                "mobileEmulation": {
                    "deviceMetrics": {"width": width, "height": 900, "pixelRatio": 1}
                },
            },
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            ask("POST", f"/{session}/url", {"url": page.resolve().as_uri()})
            found = ask("POST", f"/{session}/execute/sync", {"script": script, "args": []})
            return found, ask("POST", f"/{session}/se/log", {"type": "browser"})
        finally:
            ask("DELETE", f"/{session}")
    finally:
        driver.terminate()
        driver.wait()


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="chromium and chromedriver are not installed: apt-get install chromium chromium-driver",
)
@pytest.mark.parametrize("width", [390, 1920])
def test_browser_shows_it_whole(tmp_path, width):
    written = reports.write(example(tmp_path, 8), tmp_path)
    found, console = browse(
        written,
        width,
        """
        document.querySelector('details').open = true;
        const page = document.documentElement;
        const small = [...document.querySelectorAll('body *')].filter(e =>
            [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) &&
            e.getBoundingClientRect().width > 0 && !e.closest('.columns') &&
            parseFloat(getComputedStyle(e).fontSize) *
            (e.ownerSVGElement ? e.ownerSVGElement.getBoundingClientRect().width
                / e.ownerSVGElement.viewBox.baseVal.width : 1) < 9.5);
        const out = [...document.querySelectorAll('svg text')].filter(e => {
            const box = e.getBoundingClientRect();
            const card = e.closest('.card').getBoundingClientRect();
            return box.width && (box.left < card.left || box.right > card.right);
        });
        return {
            images: [...document.images].map(i => i.complete ? i.naturalWidth : 0),
            overflow: page.scrollWidth - page.clientWidth,
            width: page.clientWidth,
            requests: performance.getEntriesByType('resource').map(r => r.name)
                .filter(name => !name.startsWith('data:')),
            small: small.map(e => e.textContent), out: out.map(e => e.textContent),
        };
        """,
        tmp_path,
    )
    assert found["width"] == width
    assert len(found["images"]) == 17 and all(found["images"])
    assert found["overflow"] == 0
    assert found["requests"] == []
    assert found["small"] == [], "text too small to read"
    assert found["out"] == [], "text outside its card"
    assert console == []


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_in_both_schemes():
    """WCAG AA: 4.5 to 1 for text."""
    style = (Path(reports.__file__).parent / "style.css").read_text("utf-8")
    light, dark = style.split("prefers-color-scheme: dark")
    for scheme in (light, dark.split("}")[0]):
        colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", scheme))
        texts = ["ink", "muted", *(f"m{i}" for i in range(figures.PALETTE))]
        for text in texts:
            for ground in ("paper", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def test_scales():
    made = {
        "models": [
            {"scores": {"fd": fd, "coverage": c}, "speed": {"images_per_second": s}}
            for fd, c, s in [(400.0, 0.5, 12_300.0), (100.0, 0.9, 50.0)]
        ],
        "reference": {"fd": 50.0},
        "protocol": {"distance": "FD-Lite0"},
    }
    quality, coverage, speed = scales.axes(made)
    assert quality.position(50.0) == 1 and quality.position(40.0) == 1
    assert quality.position(100.0) == pytest.approx(0.75)
    assert quality.position(400.0) == pytest.approx(0.25)
    assert quality.position(1e9) == 0
    assert coverage.position(0.5) == 0.5
    assert speed.position(10.0) == 0 and speed.position(1e5) == 1
    assert speed.position(1000.0) == pytest.approx(0.5)
    for axis in (quality, coverage, speed):
        marks = [axis.position(tick) for tick in axis.ticks]
        assert {round(marks[0], 9), round(marks[-1], 9)} == {0, 1}
        assert np.allclose(np.diff(marks), np.diff(marks)[0])
        assert len(axis.marks) == len(axis.ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(12_345, "12,300"), (254.4, "254"), (8.214, "8.21"), (0.0312, "0.0312"), (50, "50"),
     (0, "0"), (float("nan"), "n/a"), (999.6, "1,000"), (0.65, "0.650"), (1234567, "1,230,000")],
)  # fmt: skip
def test_numbers_are_written_with_three_digits(value, text):
    assert scales.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (2.5, "2.50 s"), (45, "45 s"), (60, "1 min"), (75, "75 s"), (180, "3 min"),
     (150, "2.5 min"), (3600, "60 min"), (7200, "2 h"), (9000, "2 h 30 min")],
)  # fmt: skip
def test_durations_are_written_for_people(seconds, text):
    assert scales.duration(seconds) == text


def judged(*rows, noise=1.0):
    """Return the part of a report that the choice needs, from rows of (fd, coverage, speed)."""
    return {
        "models": [
            {"name": name, "scores": {"fd": fd, "coverage": coverage},
             "noise": {"fd": noise, "coverage": 0.01 * noise},
             "speed": {"images_per_second": speed, "calls": 1}}
            for name, (fd, coverage, speed) in zip("abcdefgh", rows, strict=False)
        ],
        "reference": {"fd": 50.0},
        "protocol": {"distance": "FD-Lite0"},
    }  # fmt: skip


def test_choice_says_by_how_much():
    chosen = choice.choose(judged((600.0, 0.4, 9000.0), (150.0, 0.8, 90.0)))
    assert [chosen[axis]["models"] for axis in choice.AXES] == [["b"], ["b"], ["a"]]
    assert "4.0 times as far" in chosen["quality"]["sentence"]
    assert "3.0 times what real" in chosen["quality"]["sentence"]
    assert "40 points fewer" in chosen["coverage"]["sentence"]
    assert "100 times as many as b" in chosen["speed"]["sentence"]
    assert "No model leads in all three" in chosen["overall"]


def test_choice_flags_ties_within_the_noise():
    rows = (150.0, 0.80, 100.0), (152.0, 0.79, 95.0), (300.0, 0.5, 50.0)
    chosen = choice.choose(judged(*rows))
    assert all(chosen[axis]["models"] == ["a", "b"] for axis in choice.AXES)
    assert "level" in chosen["quality"]["sentence"] and "noise" in chosen["quality"]["sentence"]
    assert "a and b" in chosen["overall"]
    told = choice.choose(judged(*rows, noise=0.1))
    assert told["quality"]["models"] == ["a"] and told["coverage"]["models"] == ["a"]


def test_choice_names_a_model_that_is_behind_in_all():
    rows = (150.0, 0.8, 100.0), (300.0, 0.5, 50.0), (200.0, 0.2, 9000.0)
    assert "b is behind a in all three" in choice.choose(judged(*rows))["overall"]


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        ([(150.0, 0.8, 90.0), (600.0, 0.4, 9000.0)], "a draws best and covers most; b is fastest"),
        ([(150.0, 0.8, 9000.0), (600.0, 0.4, 90.0)], "a leads in all three"),
        ([(150.0, 0.4, 90.0), (600.0, 0.4, 90.0)],
         "a draws best; both are level in coverage and speed"),
        ([(150.0, 0.4, 90.0)] * 3, "All are level in quality, coverage and speed"),
        ([(150.0, 0.4, 90.0), (150.0, 0.4, 9.0), (600.0, 0.9, 9.0)],
         "a and b draw best; c covers most; a is fastest"),
        ([(150.0, 0.4, 90.0)], "a on photos"),
    ],
)  # fmt: skip
def test_headline(rows, title):
    made = judged(*rows)
    assert choice.headline(choice.choose(made), made["models"], "photos") == title


def test_falling_coverage_raises_an_alarm(tmp_path):
    made = example(tmp_path, 2)
    assert choice.alarms(made["models"]) == []
    for probe, coverage in zip(made["models"][1]["probes"], [0.2, 0.5, 0.4, 0.1], strict=True):
        probe["coverage"] = coverage
    (told,) = choice.alarms(made["models"])
    assert "quick-gan fell from 50 % to 10 %" in told
    assert told in " ".join(Page(reports.render(made, tmp_path)).text)


def test_choice_of_one():
    chosen = choice.choose(judged((150.0, 0.8, 100.0)))
    assert chosen["quality"]["sentence"] == (
        "Its FD-Lite0 is 150, 3.0 times what real training pictures score (50)."
    )
    assert "compare several" in chosen["overall"]


def test_labels_are_spread_apart():
    moved = figures.spread([10, 11, 12, 300], 16, 0, 200)
    assert (np.diff(moved) >= 16 - 1e-9).all() and max(moved) <= 200
    assert figures.spread([50, 150], 16, 0, 200) == [50, 150]
    assert (np.diff(figures.spread([5.0] * 20, 16, 0, 100)) >= 16 - 1e-9).all()


@pytest.mark.parametrize(
    "values", [(131.0, 1800.0), (50.0, 55.0), (0.01, 40_000.0), (100.0, 100.0)]
)
def test_log_scale_marks_a_few_round_values(values):
    scale = figures.log_scale("distance", values)
    assert 1 <= len(scale.ticks) <= 8
    assert all(0 <= scale.place(v) <= 1 for v in [*values, *scale.ticks])


def test_markers_differ():
    drawn = {figures.marker(i, 0, 0, 5, "") for i in range(figures.PALETTE)}
    assert len(drawn) == figures.PALETTE


def test_sheet_lays_pictures_out_in_order(tmp_path):
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 8, 8) * 40
    sheets.save(images, 3, tmp_path / "a.png", lead=True)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    side, gap = 72, 3
    assert sheet.shape == (2 * side + gap, 3 * side + 2 * gap + 5 * gap, 4)
    for i in range(6):
        row, column = divmod(i, 3)
        left = column * (side + gap) + (5 * gap if column else 0)
        part = sheet[row * (side + gap) : row * (side + gap) + side, left : left + side]
        assert (part == [40 * i] * 3 + [255]).all()
    assert (sheet[:side, side : side + 5 * gap, 3] == 0).all()
