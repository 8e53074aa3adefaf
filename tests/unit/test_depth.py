"""Images as people have them: bit depths, transparency, formats, sizes. Exact pixels."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from graft.data.sources import decode as decoding
from graft.data.sources.decode import EXTENSIONS, FORMATS, Reading, decode, decode_batch
from graft.data.sources.folder import EvalFolder, ImageFolder
from graft.runs.other_data import read_alike
from graft.transforms.preprocessing import Preprocessing
from tests.unit.source_files import BLUE, RED, class_folders, corner, read, save

SIDE = 16


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def ramp(most: int, dtype: Any = np.uint16) -> NDArray[Any]:
    """(16, 16) values from 0 to `most`."""
    return np.linspace(0, most, SIDE * SIDE).round().astype(dtype).reshape(SIDE, SIDE)


def png16(path: Path, values: NDArray[Any], colour_type: int) -> Path:
    """A 16-bit PNG, which Pillow writes in grey alone."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1).astype(">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return path


def tiff16(path: Path, values: NDArray[Any], order: str, compress: bool) -> Path:
    """A 16-bit RGB TIFF, which Pillow does not write."""
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compress else data
    entries = [
        *((256, 3, 1, SIDE), (257, 3, 1, SIDE), (258, 3, 3, 0), (259, 3, 1, 8 if compress else 1)),
        *(
            (262, 3, 1, 2),
            (273, 4, 1, 0),
            (277, 3, 1, 3),
            (278, 3, 1, SIDE),
            (279, 4, 1, len(data)),
        ),
    ]
    bits_at = 8 + 2 + 12 * len(entries) + 4
    body = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        value = {258: bits_at, 273: bits_at + 6}.get(tag, value)
        short = kind == 3 and count == 1
        body += struct.pack(f"{order}HHI", tag, kind, count)
        body += struct.pack(f"{order}HH" if short else f"{order}I", value, *([0] if short else []))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + body + bytes(4) + struct.pack(f"{order}HHH", 16, 16, 16) + data)
    return path


def data_set(root: Path, name: str, image: Image.Image, **options: Any) -> Path:
    for n in range(2):
        save(root / "train" / "a" / f"{n}{name}", image, **options)
        save(root / "train" / "b" / f"{n}{name}", image, **options)
    return root


@pytest.mark.parametrize("extension", [".png", ".tif", ".tiff"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_bits_that_a_16_bit_file_uses(
    tmp_path: Path, cache: Path, bits: int, extension: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    white = 2**bits - 1
    values = ramp(white - 3 if bits > 8 else white)
    splits = read(ImageFolder(data_set(tmp_path / "d", extension, Image.fromarray(values)), cache))
    expected = np.rint(values.astype(float) * 255 / white).astype(np.uint8)
    np.testing.assert_array_equal(splits.train.images, np.broadcast_to(expected, (4, 3, 16, 16)))
    assert splits.value_range == (0.0, float(white))
    assert f"4 images of over 8 bits: 0 is black, {white} white" in caplog.text


WIDE: dict[str, tuple[NDArray[Any], tuple[float, float]]] = {
    "floats to 1": (ramp(1000).astype(np.float32) / 1000, (0, 1)),
    "floats to 255": (ramp(250).astype(np.float32), (0, 255)),
    "floats with a sign": (ramp(1000).astype(np.float32) / 100 - 2, (-2, 8)),
    "32-bit integers": (ramp(3_000_000, np.int32), (0, 3_000_000)),
    "32-bit integers that use 12 bits": (ramp(4000, np.int32), (0, 4095)),
    "integers with a sign": (ramp(4000, np.int32) - 1000, (-1000, 3000)),
    "all the same": (np.full((16, 16), -5, np.int32), (-5, -4)),
}


@pytest.mark.parametrize(("values", "limits"), WIDE.values(), ids=list(WIDE))
def test_wide_tiffs(
    tmp_path: Path, cache: Path, values: NDArray[Any], limits: tuple[float, float]
) -> None:
    splits = read(ImageFolder(data_set(tmp_path / "d", ".tif", Image.fromarray(values)), cache))
    black, white = limits
    exact: NDArray[np.float64] = (values.astype(float) - black) * 255 / (white - black)
    assert np.abs(splits.train.images - exact).max() <= 0.5 + 1e-6
    assert splits.value_range == limits


def test_values_that_are_no_numbers_are_black(tmp_path: Path, cache: Path) -> None:
    values = ramp(1000).astype(np.float32) / 1000
    values[0, :3] = np.nan, np.inf, -np.inf
    splits = read(ImageFolder(data_set(tmp_path / "d", ".tif", Image.fromarray(values)), cache))
    assert splits.train.images[0, 0, 0, :3].tolist() == [0, 255, 0]
    assert splits.train.images[0, 0, 15, 15] == 255


@pytest.mark.parametrize(
    "kind", ["png", "png alpha", "tiff <", "tiff >", "tiff < zip", "tiff > zip"]
)
def test_16_bits_in_colour(tmp_path: Path, cache: Path, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (SIDE, SIDE, 3)).astype(np.uint16)
    for name in ("a/0", "b/0"):
        path = tmp_path / "d/train" / f"{name}.{kind[:3]}"
        if kind == "png alpha":
            alpha = np.full((SIDE, SIDE, 1), 65535, np.uint16)
            png16(path, np.concatenate([values, alpha], 2), 6)
        elif kind == "png":
            png16(path, values, 2)
        else:
            tiff16(path.with_suffix(".tif"), values, kind[5], "zip" in kind)
    splits = read(ImageFolder(tmp_path / "d", cache))
    expected = np.rint(values.astype(float) * 255 / 4095).astype(np.uint8).transpose(2, 0, 1)
    np.testing.assert_array_equal(splits.train.images[0], expected)
    assert splits.value_range == (0.0, 4095.0)


def test_one_range_for_a_data_set_and_what_is_evaluated_later(tmp_path: Path, cache: Path) -> None:
    root = data_set(tmp_path / "d", ".png", Image.fromarray(ramp(4000)))
    save(root / "test/a/0.png", Image.fromarray(ramp(500)))
    save(root / "test/b/0.png", Image.fromarray(ramp(60000)))
    save(root / "train/a/8 bits.png", Image.fromarray(ramp(255, np.uint8)))
    splits = read(ImageFolder(root, cache))
    assert splits.value_range == (0.0, 4095.0)
    assert splits.test is not None
    for stored, most in zip(splits.test.images, (500, 60000), strict=True):
        clipped = np.minimum(ramp(most), 4095) * 255.0 / 4095
        np.testing.assert_array_equal(stored[0], np.rint(clipped))
    np.testing.assert_array_equal(splits.train.images[2][0], ramp(255, np.uint8))
    alike = read(EvalFolder(root, cache, value_range=[0, 4095]))
    np.testing.assert_array_equal(alike.train.images, splits.test.images)
    given = read(ImageFolder(root, cache, value_range=[0, 65535]))
    assert given.value_range == (0.0, 65535.0)
    assert given.train.images.max(axis=(1, 2, 3)).tolist() == [16, 16, 255, 16, 16]
    one = decode(root / "test/a/0.png", SIDE, None, Reading(value_range=splits.value_range))
    np.testing.assert_array_equal(one, splits.test.images[0])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"background": None, "value_range": None}, {"background": "gray", "value_range": [0, 9]}),
        (
            {"background": "red", "value_range": [1, 2]},
            {"background": "red", "value_range": [1, 2]},
        ),
        ({"download": True}, {"download": True}),
    ],
)
def test_eval_reads_other_images_as_the_run_did_where_nothing_else_is_said(
    source: dict[str, Any], expected: dict[str, Any]
) -> None:
    read_alike(source, {"background": "gray"}, (0, 9))
    assert source == expected


def test_only_test_images_are_deep(tmp_path: Path, cache: Path) -> None:
    root = data_set(tmp_path / "d", ".png", Image.new("RGB", (SIDE, SIDE), RED))
    save(root / "test/a/0.png", Image.fromarray(ramp(1000)))
    assert read(ImageFolder(root, cache)).value_range == (0.0, 1023.0)


def test_floats_beside_whole_numbers_need_the_key(tmp_path: Path, cache: Path) -> None:
    root = data_set(tmp_path / "d", ".png", Image.fromarray(ramp(4000)))
    save(root / "train/a/9.tif", Image.fromarray(ramp(4000).astype(np.float32)))
    with pytest.raises(ValueError, match=r"floats and of whole numbers.*value_range=\[0,4095\]"):
        read(ImageFolder(root, cache))
    images = read(ImageFolder(root, cache, value_range=(0, 4095))).train.images
    np.testing.assert_array_equal(images[0], images[2])


@pytest.mark.parametrize("bad", [[5], [5, 5], [9, 1], "auto", 5, [0, float("inf")], ["a", "b"]])
def test_a_wrong_range_is_one_line(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^data\.source\.value_range=.*must be null, or"):
        ImageFolder(tmp_path, tmp_path, value_range=bad)


@pytest.mark.parametrize(
    ("key", "bad"), [("background", "pinkish"), ("background", 5), ("max_megapixels", -1)]
)
def test_other_wrong_values_are_one_line(tmp_path: Path, key: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"^data\.source\.{key}=.*must be"):
        ImageFolder(tmp_path, tmp_path, **{key: bad})


def _alpha(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """Left half opaque black, right half transparent, with something hidden below."""
    values = np.zeros((SIDE, SIDE, 4), np.uint8)
    values[:, :8, 3] = 255
    values[:, 8:, :3] = 77
    image = Image.fromarray(values)
    if mode == "P":
        flat = Image.fromarray((values[..., 0] > 0).astype(np.uint8)).convert("P")
        flat.putpalette([0, 0, 0, 77, 77, 77])
        return flat, {"transparency": 1}
    if mode in ("L", "RGB"):
        return image.convert("RGB").convert(mode), {
            "transparency": 77 if mode == "L" else (77,) * 3
        }
    return image.convert(mode), {}


@pytest.mark.parametrize("background", [None, "black", "#0a141e"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_parts_show_the_background(
    tmp_path: Path, cache: Path, mode: str, background: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    image, options = _alpha(mode)
    root = data_set(tmp_path / "d", ".png", image, **options)
    images = read(ImageFolder(root, cache, background=background)).train.images
    colour = {None: 255, "black": 0, "#0a141e": np.array([10, 20, 30]).reshape(3, 1, 1)}[background]
    assert (images[0, :, :, :8] == 0).all()
    assert (images[0, :, :, 8:] == colour).all()
    assert f"4 images with transparent parts, shown on {background or 'white'}" in caplog.text


def test_half_transparent_is_blended_and_opaque_is_not_mentioned(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    root = data_set(tmp_path / "d", ".png", Image.new("RGBA", (SIDE, SIDE), (*RED, 255)))
    assert corner(read(ImageFolder(root, cache)).train.images)[0] == RED
    assert "transparent" not in caplog.text
    save(root / "train/a/0.png", Image.new("RGBA", (SIDE, SIDE), (100, 0, 200, 51)))
    assert corner(read(ImageFolder(root, cache)).train.images)[0] == (224, 204, 244)


SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    **{extension: ("RGB", {}) for extension in (".png", ".bmp", ".dib", ".tif", ".tiff", ".ppm")},
    **{extension: ("RGB", {}) for extension in (".pnm", ".qoi", ".sgi")},
    **{extension: ("L", {}) for extension in (".pgm", ".gif")},
    **{extension: ("1", {}) for extension in (".pbm",)},
    ".webp": ("RGB", {"lossless": True}),
    ".jp2": ("RGB", {}),
    ".apng": ("RGB", {"format": "PNG"}),
}


@pytest.mark.parametrize("extension", list(SAVED))
def test_lossless_formats(tmp_path: Path, extension: str) -> None:
    mode, options = SAVED[extension]
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    path = save(tmp_path / f"x{extension}", image, **options)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(path, SIDE, None), expected)


@pytest.mark.parametrize("extension", [".jpg", ".jpe", ".jfif", ".jpeg", ".avif"])
def test_lossy_formats(tmp_path: Path, extension: str) -> None:
    form = "AVIF" if extension == ".avif" else "JPEG"
    path = save(tmp_path / f"x{extension.upper()}", BLUE, format=form)
    assert np.abs(decode(path, 24, None).astype(int) - np.array(BLUE).reshape(3, 1, 1)).max() < 4


@pytest.mark.parametrize("extension", [".gif", ".png", ".webp", ".tif"])
def test_of_an_animation_the_first_frame(tmp_path: Path, extension: str) -> None:
    frames = [Image.new("RGB", (24, 24), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if extension == ".webp" else {}
    path = save(
        tmp_path / f"x{extension}", frames[0], save_all=True, append_images=frames[1:], **options
    )
    assert (decode(path, 24, None) == np.array(RED).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_the_content_decides_not_the_extension(tmp_path: Path, form: str) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (24, 24), (255, 255, 255)).save(path, format=form)
    assert (decode(path, 24, None) == 255).all()


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n", b"%PDF"]
)
def test_no_decoder_that_starts_a_program(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started {args}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(f"subprocess.{name}", started)
    (tmp_path / "x.png").write_bytes(content)
    [(_, why)] = decode_batch(tmp_path, [("x.png", 0)], 24, Preprocessing(24, 24)).unreadable
    assert why.startswith("not an image in a format that can be read (JPEG, PNG,")
    assert not {"EPS", "WMF", "PSD", "ICO", "TGA"} & FORMATS.keys()


def test_extensions_belong_to_one_format() -> None:
    assert len(EXTENSIONS) == sum(len(extensions) for extensions in FORMATS.values())
    assert all(name == name.lower() and name[0] == "." for name in EXTENSIONS)


def test_large_texts_and_profiles_are_read(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("software", "x" * 3_000_000, zip=True)
    path = save(tmp_path / "x.png", RED, pnginfo=text, icc_profile=bytes(3_000_000))
    assert (decode(path, 24, None) == np.array(RED).reshape(3, 1, 1)).all()


def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", RED, exif=b"Exif\0\0garbage")
    assert (decode(path, 24, None) == np.array(RED).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    reading = Reading(value_range=(0, 255))
    deep = save(tmp_path / "16.png", Image.fromarray(ramp(255)), exif=exif)
    flat = save(tmp_path / "8.png", Image.fromarray(ramp(255, np.uint8)), exif=exif)
    np.testing.assert_array_equal(decode(deep, SIDE, None, reading), decode(flat, SIDE, None))


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("1", (20_000, 15_000)).save(path)
    [(_, why)] = decode_batch(tmp_path, [("x.png", 0)], 24, Preprocessing(24, 24)).unreadable
    assert why == "20000 x 15000 are 300 megapixels, more than data.source.max_megapixels=200"


def test_of_a_jpeg_counts_what_is_decoded(tmp_path: Path) -> None:
    image, buffer = Image.new("L", (800, 800), 90), {False: io.BytesIO(), True: io.BytesIO()}
    reading = Reading(max_megapixels=0.05)
    for progressive, file in buffer.items():
        image.save(file, "JPEG", progressive=progressive)
    assert (
        np.abs(decode(buffer[False], 24, Preprocessing(24, 24), reading).astype(int) - 90).max()
        <= 1
    )
    with pytest.raises(ValueError, match=r"800 x 800 are 1 megapixels"):
        decode(buffer[True], 24, Preprocessing(24, 24), reading)


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    rgb = decoding._rgb

    def watched(*args: Any) -> Image.Image:
        seen.append(decoding._large.locked())
        return rgb(*args)

    monkeypatch.setattr(decoding, "_rgb", watched)
    path = save(tmp_path / "x.png", RED)
    decode(path, 24, None)
    monkeypatch.setattr(decoding, "LARGE", 100)
    decode(path, 24, None)
    assert seen == [False, True]
    assert not decoding._large.locked()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_images_are_unreadable_and_nothing_else(tmp_path: Path) -> None:
    """Flips, cuts and junk in every format: a reason, or pixels; never another exception."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    contents = []
    for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "QOI", "SGI"):
        buffer = io.BytesIO()
        pixels.save(buffer, form)
        contents.append(np.frombuffer(buffer.getvalue(), np.uint8))
    names = []
    for n in range(600):
        content = contents[n % len(contents)].copy()
        for at in rng.integers(0, min(len(content), 200 if n % 2 else 1 << 20), 1 + n % 4):
            content[at] = rng.integers(0, 256)
        if n % 5 == 0:
            content = content[: rng.integers(0, len(content))]
        (tmp_path / f"{n}.png").write_bytes(content.tobytes())
        names.append((f"{n}.png", n))
    batch = decode_batch(
        tmp_path, names, SIDE, Preprocessing(SIDE, SIDE), reading=Reading(value_range=(0, 1))
    )
    assert len(batch.labels) + len(batch.unreadable) == len(names)
    assert len(batch.unreadable) > 50
    assert all("\n" not in why for _, why in batch.unreadable)


def test_a_store_that_is_cut_while_in_use_is_an_error(tmp_path: Path, cache: Path) -> None:
    from graft.data.datasets import ImageDataset

    splits = read(ImageFolder(class_folders(tmp_path / "d"), cache))
    dataset = ImageDataset(splits.train)
    assert dataset[[0, 5]]["input"].shape == (2, 3, 24, 24)
    [stored] = cache.glob("*/train-images.npy")
    with stored.open("r+b") as file:
        file.truncate(4000)
    with pytest.raises(OSError, match=r"train-images\.npy was cut while in use"):
        dataset[[0, 5]]
    stored.unlink()
    ImageDataset(read(ImageFolder(tmp_path / "d", cache)).train)[[0, 5]]
