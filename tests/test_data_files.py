"""Files of every kind to pixels: what is used rightly, what is skipped, and the cache."""

import json
import os
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

import pictures
from trilemma import data
from trilemma.data.cache import cache_root
from trilemma.data.check import describe
from trilemma.data.decode import decode, read_header
from trilemma.data.listing import Unusable
from trilemma.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels(image, format="PNG", side=None, background="white", grey=False, **options):
    content = pictures.encoded(image, format, **options)
    return decode(content, side or image.size[0], background, grey)


def quadrants(size=16):
    """Red and green above, blue and white below."""
    half = size // 2
    image = np.zeros((size, size, 3), np.uint8)
    image[:half, :half, 0] = image[:half, half:, 1] = image[half:, :half, 2] = 255
    image[half:, half:] = 255
    return Image.fromarray(image)


def corners(array):
    return [tuple(int(v > 127) for v in array[:, y, x]) for y in (2, -3) for x in (2, -3)]


RED, GREEN, BLUE, WHITE = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)


def test_native_size_is_exact():
    image = pictures.picture(0, (24, 24))
    assert np.array_equal(pixels(image), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG", "AVIF"])
def test_formats(format):
    options = {"quality": 100} if format in ("JPEG", "AVIF") else {"lossless": True}
    if format in ("PNG", "BMP", "GIF", "TIFF", "PPM"):
        options = {}
    assert corners(pixels(quadrants(), format, **options)) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation(orientation, format):
    turn = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180]
    turn += [Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90]
    turn += [Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270]
    stored = quadrants(64)
    if orientation > 1:
        stored = stored.transpose(turn[orientation - 1])  # how a camera held so would store it
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(stored, format, side=16, exif=exif)
    assert corners(found) == [RED, GREEN, BLUE, WHITE]


def test_damaged_exif_does_not_matter():
    content = pictures.encoded(
        quadrants(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95
    )
    assert corners(decode(content, 16, "white")) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "PA", "P with transparency", "RGB with transparency"]
)
def test_transparency_is_composed_on_the_background(mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((60, 60, 60, 255), (0, 0, 16, 8))
    options = {}
    format = "PNG"
    if mode == "P with transparency":
        image = image.convert("RGB").quantize(4)
        options["transparency"] = image.getpixel((0, 15))
    elif mode == "RGB with transparency":
        image = image.convert("RGB")
        options["transparency"] = (0, 0, 0)
    elif mode == "PA":
        format = "TIFF" if "PA" in Image.MODES else "PNG"
        image = image.convert("LA")
    else:
        image = image.convert(mode)
    found = pixels(image, format, background="#ff0000", **options)
    assert found.shape == (3, 16, 16)
    assert found[:, 2, 8].tolist() == [60, 60, 60] and found[:, 13, 8].tolist() == [255, 0, 0]
    on_white = pixels(image, format, **options)
    assert on_white.shape == (1, 16, 16) and on_white[0, 13, 8] == 255  # grey again


def test_half_transparent():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert np.allclose(pixels(image)[:, 4, 4], [255, 127, 127], atol=1)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    found = pixels(Image.fromarray(ramp), format)
    assert found.shape == (1, 64, 64)
    assert np.array_equal(found[0], np.rint(ramp / 257).astype(np.uint8))


def test_sixteen_bit_colour(tmp_path):
    """Pillow writes no 16-bit RGB, so the PNG is written here."""

    def chunk(kind, body):
        return (
            len(body).to_bytes(4, "big") + kind + body
            + zlib.crc32(kind + body).to_bytes(4, "big")
        )  # fmt: skip

    row = b"\0" + np.array([[40000, 20000, 65535]] * 8, ">u2").tobytes()
    header = (8).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b"")
    assert np.allclose(decode(content, 8, "white")[:, 4, 4], [156, 78, 255], atol=1)


def test_floats():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert np.array_equal(pixels(Image.fromarray(ramp), "TIFF")[0], np.rint(ramp * 255))
    stretched = pixels(Image.fromarray(ramp * 70 - 20), "TIFF")[0]
    assert np.array_equal(stretched, np.rint(ramp * 255))
    ramp[3, 3] = np.nan
    with pytest.raises(Unusable, match="not finite"):
        pixels(Image.fromarray(ramp), "TIFF")


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    options = {"quality": 100} if format == "JPEG" else {}
    found = pixels(quadrants(64).convert("CMYK"), format, side=16, **options)
    assert corners(found) == [RED, GREEN, BLUE, WHITE]


def test_one_bit_and_palette_grey_have_one_channel():
    image = Image.fromarray(np.tile([0, 255], (8, 4)).astype(np.uint8))
    assert np.array_equal(pixels(image.convert("1"))[0], np.asarray(image))
    assert pixels(image.convert("P")).shape == (1, 8, 8)
    assert pixels(image.convert("RGB")).shape == (1, 8, 8)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(format):
    first, second = quadrants(), Image.new("RGB", (16, 16), (9, 9, 9))
    options = {"lossless": True} if format == "WEBP" else {}
    found = pixels(first, format, save_all=True, append_images=[second], **options)
    assert corners(found) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("size", [(64, 16), (16, 64), (67, 16)])
def test_the_centred_square_is_cut_out(size):
    wide = Image.new("RGB", size, (0, 0, 0))
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    wide.paste(quadrants(), (left, top))
    assert np.array_equal(pixels(wide, side=16), np.asarray(quadrants()).transpose(2, 0, 1))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_shrinking_does_not_alias(format):
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    found = pixels(Image.fromarray(board), format, side=16)
    assert np.abs(found.astype(int) - 127).max() <= 4


def test_grey_by_luma():
    found = pixels(Image.new("RGB", (8, 8), (255, 0, 0)), grey=True)
    assert found.shape == (1, 8, 8) and found[0, 0, 0] == 76


def test_a_decompression_bomb_is_told_by_its_header():
    for width, height in ((60_000, 60_000), (12_000, 9_000)):
        with pytest.raises(Unusable, match="decompression bomb"):
            read_header(pictures.bomb_png(width, height))


def test_a_wrong_suffix_does_not_matter(tmp_path):
    root = pictures.folder(tmp_path / "p", 6)
    (root / "jpeg.png").write_bytes(pictures.encoded(quadrants(), "JPEG"))
    (root / "UPPER.JPG").write_bytes(pictures.encoded(quadrants(32), "PNG"))
    report = data.check(root)
    assert report["pictures"] == 8 and not report["unusable"]
    names = {file["path"]: file["format"] for file in report["mislabelled"]}
    assert names == {"jpeg.png": "JPEG", "UPPER.JPG": "PNG"}


def test_two_hundred_pictures_with_fifteen_bad_ones(tmp_path, wrapped_in_zip):
    root = pictures.folder(tmp_path / "p", 185, (40, 30))
    reasons = pictures.bad_files(root)
    (root / "notes.txt").write_text("no picture, and not said to be one")
    if wrapped_in_zip:
        (root / "bad_link.png").unlink()
        del reasons["bad_link.png"]
        root = pictures.zipped(root, tmp_path / "p.zip")
    else:
        assert len(reasons) == 15
    report = data.check(root)
    assert report["pictures"] == 185
    found = {file["path"]: file["reason"] for file in report["unusable"]}
    assert set(found) == set(reasons)
    for name, word in reasons.items():
        assert word in found[name], (name, found[name])
    train, test = data.load(root), data.load(root, split="test")
    assert len(train) + len(test) == 185
    text = describe(report)
    assert all(name in text for name in reasons) and f"{len(reasons)} files cannot be used" in text
    json.dumps(report)


@pytest.fixture(params=[False, True], ids=["folder", "zip"])
def wrapped_in_zip(request):
    return request.param


def test_odd_things_in_a_folder(tmp_path):
    """A loop of links, a pipe, a folder with a picture's name, hidden files, odd names."""
    root = pictures.folder(tmp_path / "p", 5)
    (root / "loop").symlink_to(root)
    (root / "ring.png").symlink_to(root / "ring.png")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    (root / ".hidden.png").write_bytes(b"junk")
    name = os.fsencode(root / "odd \n ü ") + b"\xff.png"
    with open(name, "wb") as stream:
        stream.write(pictures.encoded(pictures.picture(99)))
    report = data.check(root)
    assert report["pictures"] == 6
    assert {file["path"] for file in report["unusable"]} == {"ring.png", "pipe.png"}
    json.dumps(report)
    describe(report).encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_without_permission(tmp_path):
    root = pictures.folder(tmp_path / "p", 5)
    (root / "0001.png").chmod(0)
    pictures.folder(root / "closed", 2).chmod(0)
    report = data.check(root)
    (root / "closed").chmod(0o755)
    reasons = {file["path"]: file["reason"] for file in report["unusable"]}
    assert report["pictures"] == 4
    assert "Permission denied" in reasons["0001.png"] and "Permission denied" in reasons["closed"]


def test_files_that_refuse_to_be_read_are_listed(tmp_path, monkeypatch):
    """The same for a root user: the system's refusal is simulated."""
    root = pictures.folder(tmp_path / "p", 5)
    really = type(root).read_bytes

    def refuse(path):
        if path.name == "0001.png":
            raise PermissionError(13, "Permission denied")
        return really(path)

    monkeypatch.setattr(type(root), "read_bytes", refuse)
    report = data.check(root)
    assert report["pictures"] == 4
    assert report["unusable"][0]["reason"] == "cannot be read: Permission denied"


def test_empty_folders_say_what_was_seen(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in .*empty: it is empty; expected .png"):
        data.load(tmp_path / "empty")
    for name in ("a.txt", "b.txt", "c.doc", "README"):
        (tmp_path / "empty" / name).write_text("x")
    with pytest.raises(UserError, match=r"saw 4 files: .txt \(2\), .doc \(1\), no suffix \(1\)"):
        data.check(tmp_path / "empty")
    (tmp_path / "empty" / "x.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="none of the 1 picture files .* x.png: not a picture"):
        data.load(tmp_path / "empty")


# Splits by content


def test_split_by_content_is_a_tenth_and_stays_when_pictures_are_added(tmp_path):
    root = pictures.folder(tmp_path / "p", 150, (8, 8))
    train, test = data.load(root), data.load(root, split="test")
    assert len(train) + len(test) == 150 and 5 <= len(test) <= 28
    tested = {image.tobytes() for image in test.images}
    pictures.folder(root / "more", 100, (8, 8), seed=1000)
    again = {image.tobytes() for image in data.load(root, split="test").images}
    assert tested < again
    assert not again & {image.tobytes() for image in data.load(root).images}


def test_tiny_folders_keep_one_picture_for_testing(tmp_path):
    for count in (2, 3, 5):
        root = pictures.folder(tmp_path / str(count), count)
        assert len(data.load(root, split="test")) >= 1 and len(data.load(root)) >= 1
    root = pictures.folder(tmp_path / "one", 1)
    assert len(data.load(root)) == 1
    with pytest.raises(UserError, match=r"no pictures in its split 'test' .*1 train"):
        data.load(root, split="test")


def test_copies_fall_on_one_side(tmp_path):
    root = pictures.folder(tmp_path / "p", 40, (8, 8))
    pictures.folder(root / "copies", 40, (8, 8))
    train, test = data.load(root), data.load(root, split="test")
    assert len(test) % 2 == 0
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in test.images}


# The cache


def decoded():
    """The decoded sets in the cache."""
    root = cache_root() / "data"
    return sorted(path.name for path in root.iterdir() if path.name != "index")


def test_a_second_load_reads_no_picture(tmp_path, monkeypatch):
    root = pictures.folder(tmp_path / "p")
    first = data.load(root)
    monkeypatch.setattr("trilemma.data.cache.fitted", None)
    monkeypatch.setattr("trilemma.data.cache.read_header", None)
    second = data.load(root)
    assert second.fingerprint == first.fingerprint and isinstance(second.images, np.memmap)
    assert np.array_equal(first.images, second.images)


@pytest.mark.parametrize("change", ["add", "remove", "replace", "same size and date", "caption"])
def test_changed_folders_are_noticed(tmp_path, change):
    root = pictures.folder(tmp_path / "p", 12, (8, 8))
    for k in range(12):  # of one size, so that only the pixels differ
        Image.new("RGB", (8, 8), (k, 2 * k, 200)).save(root / f"{k:04d}.bmp")
        (root / f"{k:04d}.png").unlink()
    before = data.load(root, split="all")
    old = (root / "0003.bmp").stat()
    if change == "add":
        Image.new("RGB", (8, 8), (255, 0, 0)).save(root / "new.bmp")
    elif change == "remove":
        (root / "0003.bmp").unlink()
    elif change == "caption":
        (root / "0003.txt").write_text("the third")
    else:
        Image.new("RGB", (8, 8), (255, 0, 0)).save(root / "0003.bmp")
    if change == "same size and date":
        os.utime(root / "0003.bmp", ns=(old.st_atime_ns, old.st_mtime_ns))
        assert (root / "0003.bmp").stat().st_size == old.st_size
    after = data.load(root, split="all")
    assert after.fingerprint != before.fingerprint
    assert len(after) == {"add": 13, "remove": 11}.get(change, 12)
    red = (after.images[:, 0] == 255).all((1, 2)).sum()
    assert red == (change not in ("remove", "caption"))
    assert (after.text is not None) == (change == "caption")


def test_a_touched_or_moved_folder_is_not_decoded_again(tmp_path, monkeypatch):
    root = pictures.folder(tmp_path / "p")
    before = data.load(root)
    monkeypatch.setattr("trilemma.data.cache.fitted", None)
    for path in root.iterdir():
        os.utime(path)
    assert data.load(root).fingerprint == before.fingerprint
    root.rename(tmp_path / "q")
    assert data.load(tmp_path / "q").fingerprint == before.fingerprint
    assert len(decoded()) == 1


def test_each_setting_has_its_own_cache(tmp_path):
    root = pictures.folder(tmp_path / "p")
    prints = {data.load(root, **s).fingerprint for s in ({}, {"size": 8}, {"channels": 1})}
    assert len(prints) == 3 and len(decoded()) == 3
    assert data.load(root, channels=1).shape == (1, 40, 40)


def test_grey_folders_have_one_channel(tmp_path):
    for k in range(6):
        pictures.save(pictures.picture(k, mode="L").convert("RGB"), tmp_path / "p" / f"{k}.png")
    assert data.load(tmp_path / "p").shape == (1, 40, 40)
    assert data.load(tmp_path / "p", channels=3).shape == (3, 40, 40)
    pictures.save(pictures.picture(9), tmp_path / "p" / "colour.png")
    assert data.load(tmp_path / "p").shape == (3, 40, 40)


def test_default_size(tmp_path):
    assert data.load(pictures.folder(tmp_path / "a", size=(40, 40))).shape[1:] == (40, 40)
    assert data.load(pictures.folder(tmp_path / "b", size=(40, 41))).shape[1:] == (64, 64)
    assert data.load(pictures.folder(tmp_path / "c", size=(96, 96))).shape[1:] == (64, 64)
    assert data.load(tmp_path / "a", multiple=16).shape[1:] == (48, 48)


def test_damaged_cache_files_are_made_anew(tmp_path):
    root = pictures.folder(tmp_path / "p")
    before = data.load(root, split="all").images.copy()
    folder = cache_root() / "data" / decoded()[0]
    (folder / "meta.json").unlink()
    for index in (cache_root() / "data" / "index").iterdir():
        index.write_text("{")
    assert np.array_equal(data.load(root, split="all").images, before)


def test_several_processes_may_build_the_same_cache(tmp_path):
    root = pictures.folder(tmp_path / "p", 30)
    found, errors = [], []

    def build():
        try:
            found.append(data.load(root, split="all").images.sum())
        except Exception as error:  # handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 4 and len(set(found)) == 1
    assert len(decoded()) == 1  # and no draft is left


def test_an_interrupted_build_leaves_nothing_that_counts(tmp_path, monkeypatch):
    root = pictures.folder(tmp_path / "p", 30)
    real = data.cache.fitted

    def interrupted(*arguments, **options):
        if threading.get_ident() and interrupted.left == 0:
            raise KeyboardInterrupt
        interrupted.left -= 1
        return real(*arguments, **options)

    interrupted.left = 10
    monkeypatch.setattr("trilemma.data.cache.fitted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load(root)
    assert decoded() == []
    monkeypatch.setattr("trilemma.data.cache.fitted", real)
    assert len(data.load(root, split="all")) == 30


def test_an_unwritable_cache_is_a_clear_error(tmp_path, monkeypatch):
    root = pictures.folder(tmp_path / "p")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written: .*set XDG_CACHE_HOME"):
        data.load(root)
