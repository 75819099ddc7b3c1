"""Every way a picture can come in gives the pixels it should, or one clear line."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyalign.runtime import PictureError, images
from tinyalign.runtime.images import load_picture, preprocess, resize
from tinyalign.runtime.manifest import ImageSpec

SIZES = ((113, 251), (47, 999))  # odd, width x height
SPEC = ImageSpec()


def pattern(width: int, height: int) -> np.ndarray:
    """u8 [H, W, 4]: slopes, stripes and a hard edge, made by whole-number arithmetic."""
    y, x = np.mgrid[:height, :width]
    channels = (
        x * 255 // (width - 1),
        y * 255 // (height - 1),
        (x * y + 3 * x) % 256,
        255 - x % 256,
    )
    pixels = np.stack(channels, axis=2).astype(np.uint8)
    pixels[height // 3 : height // 2, width // 4 : width // 2, :3] = (250, 5, 130)
    return pixels


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(source: images.Picture) -> np.ndarray:
    picture = load_picture(source)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(rgb * share + 255 * (1 - share))


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


# ---- preprocessing --------------------------------------------


def bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """Antialiased cubic convolution (a = -0.5), first across, then down, rounded after each."""

    def along(rows: np.ndarray) -> np.ndarray:  # [n, ...] -> [size, ...]
        step = len(rows) / size
        reach = max(step, 1.0)
        out = []
        for i in range(size):
            middle = (i + 0.5) * step
            first = max(0, int(middle - 2 * reach + 0.5))
            last = min(len(rows), int(middle + 2 * reach + 0.5))
            d = np.abs((np.arange(first, last) - middle + 0.5) / reach)
            near = (1.5 * d - 2.5) * d * d + 1
            far = -0.5 * (((d - 5) * d + 8) * d - 4)
            weight = np.where(d < 1, near, np.where(d < 2, far, 0))
            out.append(np.tensordot(weight / weight.sum(), rows[first:last], axes=1))
        return np.clip(np.rint(np.array(out)), 0, 255)

    across = along(pixels.astype(float).transpose(1, 0, 2)).transpose(1, 0, 2)
    return along(across)


@pytest.mark.parametrize("size", SIZES)
def test_resize_matches_an_independent_bicubic(size: tuple[int, int]) -> None:
    rgb = pattern(*size)[..., :3]
    ours = resize(load_picture(Image.fromarray(rgb)), SPEC)
    assert ours.shape == (260, 260, 3)
    assert np.abs(ours - bicubic(rgb, 260)).max() <= 1


@pytest.mark.parametrize(
    ("size", "golden"),
    [(SIZES[0], "9ef80f08118a368c"), (SIZES[1], "e4577e892dc8fb2b")],
)
def test_pixels_at_odd_sizes_never_change(size: tuple[int, int], golden: str) -> None:
    image = Image.fromarray(pattern(*size)[..., :3])
    for source in (image, encoded(image, "PNG"), np.asarray(image)):
        squashed = resize(load_picture(source), SPEC)
        assert hashlib.sha256(squashed.tobytes()).hexdigest()[:16] == golden


def test_preprocess_is_channels_first_and_scaled() -> None:
    image = Image.new("RGB", (5, 7), (127, 255, 0))
    chw = preprocess(image, SPEC)
    assert chw.shape == (3, 260, 260)
    assert chw.dtype == np.float32
    assert chw.flags.c_contiguous
    assert [float(c.min()) for c in chw] == [float(c.max()) for c in chw] == [0.0, 1.0, -127 / 128]


# ---- preprocessing of other encoders --------------------------------------------

CROP = {"size": {"shortest_edge": 61}, "crop_size": 56}
HALF = ((127.5,) * 3,) * 2
CLIP = ((122.7709383, 116.7460125, 104.0937362), (68.5005327, 66.6321579, 70.3231646))
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@pytest.mark.parametrize(
    "size", [(60, 60), (300, 200), (199, 301), (57, 640), (1000, 33), (30, 20)]
)
@pytest.mark.parametrize(
    ("kind", "options", "spec"),
    [
        ("CLIP", CROP, ImageSpec(56, *CLIP, fit="crop", resize=61)),
        ("Bit", CROP | {"resample": 2}, ImageSpec(56, *CLIP, "bilinear", fit="crop", resize=61)),
        (
            "Bit",
            CROP | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
            ImageSpec(56, *IMAGENET, fit="crop", resize=61),
        ),
        ("Siglip", {"size": {"height": 56, "width": 56}}, ImageSpec(56, *HALF)),
        ("ViT", {"size": {"height": 56, "width": 56}}, ImageSpec(56, *HALF, "bilinear")),
        ("ViT", {"size": 56, "resample": 1}, ImageSpec(56, *HALF, "lanczos")),
    ],
)
def test_pixels_are_those_of_transformers(
    kind: str, options: dict[str, object], spec: ImageSpec, size: tuple[int, int]
) -> None:
    import transformers

    picture = Image.fromarray(pattern(*size)[..., :3])
    processor = getattr(transformers, f"{kind}ImageProcessor")(**options)
    theirs = processor(picture, return_tensors="np")["pixel_values"][0]
    ours = preprocess(load_picture(picture), spec)
    assert ours.shape == theirs.shape == (3, 56, 56)
    levels = np.abs(ours - theirs) * np.reshape(spec.scale, (3, 1, 1))
    if size == (57, 640) and spec.fit == "squash":
        # transformers resizes in one call, and there Pillow 13 goes down first, then across: the
        # pixels between the two are rounded and cut off at 0 and 255 elsewhere.
        assert levels.mean() < 0.5 and levels.max() < 16
    else:  # every pixel is the same before it is scaled
        assert levels.max() < 3e-4


def test_a_long_picture_is_cropped_without_being_resized_as_a_whole() -> None:
    spec = ImageSpec(56, fit="crop", resize=61)
    for size in ((3_000_001, 2), (2, 3_000_001)):
        picture = Image.new("RGB", size, (9, 9, 9))
        middle = tuple((side - 1) // 2 for side in size)
        picture.paste((200, 100, 50), (max(0, middle[0] - 40), max(0, middle[1] - 40), *size))
        pixels = resize(picture, spec)
        assert pixels.shape == (56, 56, 3)
        assert (pixels == (200, 100, 50)).all()


@pytest.mark.parametrize("size", [(2000, 1500), (300, 1400)])
def test_a_large_jpeg_keeps_pixels_enough_to_be_cropped(size: tuple[int, int]) -> None:
    spec = ImageSpec(56, fit="crop", resize=112)
    x, y = np.meshgrid(np.linspace(0, 9, size[0]), np.linspace(0, 7, size[1]))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    data = encoded(Image.fromarray((127 + 100 * waves).astype(np.uint8)), "JPEG", quality=95)
    small = images.load_for(data, spec)
    assert min(small.size) >= 2 * spec.resize
    assert (small.size == size) == (min(size) < 4 * spec.resize)
    difference = np.abs(resize(load_picture(data), spec).astype(int) - resize(small, spec))
    assert difference.max() <= 6 and difference.mean() < 1


def test_banks_made_before_pictures_could_be_cropped_stay_valid() -> None:
    from tinyalign.training.fingerprint import image_words

    assert image_words(SPEC) == (
        '{"background": [255, 255, 255], "mean": 127.0, "resample": "bicubic", "scale": 128.0, '
        '"size": 260}'
    )
    others = [ImageSpec(mean=CLIP[0]), ImageSpec(fit="crop", resize=260), ImageSpec(size=224)]
    assert len({image_words(spec) for spec in [SPEC, *others]}) == 4


def test_training_reads_pictures_with_this_very_function() -> None:
    from tinyalign.training import features

    assert features.preprocess is preprocess


# ---- modes --------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F"]
)
def test_every_mode(mode: str, size: tuple[int, int]) -> None:
    rgba = pattern(*size)
    rgb, alpha, level = rgba[..., :3], rgba[..., 3], rgba[..., 0]
    table = np.arange(768).reshape(256, 3).astype(np.uint8)
    expected, tolerance = grey(level).astype(float), 0
    if mode == "1":
        image = Image.fromarray(level > 99)
        expected = grey((level > 99) * 255.0)
    elif mode == "L":
        image = Image.fromarray(level)
    elif mode == "LA":
        image = Image.fromarray(np.stack([level, alpha], axis=2))
        expected, tolerance = over_white(expected, alpha), 1
    elif mode in ("P", "PA"):
        image = Image.fromarray(level)
        image.putpalette(table.tobytes())
        expected = table[level].astype(float)
        if mode == "PA":
            image = image.convert("PA")
            image.putalpha(Image.fromarray(alpha))
            expected, tolerance = over_white(expected, alpha), 1
    elif mode in ("RGB", "RGBA"):
        image = Image.fromarray(rgba if mode == "RGBA" else rgb)
        expected = over_white(rgb, alpha) if mode == "RGBA" else rgb
        tolerance = mode == "RGBA"
    elif mode == "CMYK":
        image = Image.merge("CMYK", [Image.fromarray(c) for c in np.moveaxis(rgba, 2, 0)])
        expected, tolerance = (255.0 - rgb) * (255 - alpha[..., None]) / 255, 1
    elif mode == "I;16":
        image = Image.fromarray(level.astype(np.uint16) * 257)
    elif mode == "I;16B":
        wide = (level.astype(">u2") * 257).astype(">u2")
        image = Image.frombytes("I;16B", size, wide.tobytes())
    elif mode == "I":
        image = Image.fromarray(level.astype(np.int32) * 257)
    else:
        image = Image.fromarray((level / 255).astype(np.float32))
    assert image.mode == mode
    assert np.abs(pixels_of(image) - expected).max() <= tolerance


def test_transparency_of_palette_and_key_colour() -> None:
    level = pattern(*SIZES[0])[..., 0]
    image = Image.fromarray(level)
    image.putpalette(np.arange(768).astype(np.uint8).tobytes())
    for options, seen in (
        ({"transparency": 7}, level == 7),
        ({"transparency": b"\0" * 9}, level < 9),
    ):
        pixels = pixels_of(encoded(image, "PNG", **options))
        assert (pixels[seen] == 255).all()
        assert (pixels[~seen] != 255).any()
    keyed = encoded(Image.fromarray(pattern(9, 9)[..., :3]), "PNG", transparency=(250, 5, 130))
    assert (pixels_of(keyed)[3] == 255).all(axis=1).any()


def test_16_bit_png_and_background() -> None:
    level = pattern(*SIZES[0])[..., 0]
    data = encoded(Image.fromarray(level.astype(np.uint16) * 257), "PNG")
    assert (pixels_of(data) == grey(level)).all()
    clear = Image.new("RGBA", (3, 3), (9, 9, 9, 0))
    assert np.asarray(load_picture(clear, (1, 2, 3)))[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = pattern(16, 24)[..., :3]
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),  # a camera turned so that the picture needs a turn to the right
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    assert (pixels_of(encoded(stored, "PNG", exif=exif)) == upright).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_counts_as_none() -> None:
    image = Image.fromarray(pattern(8, 8)[..., :3])
    assert (pixels_of(encoded(image, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")) == image).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels_of(data) == (255, 0, 0)).all()


# ---- sources --------------------------------------------


def test_all_sources_give_the_same_pixels(tmp_path: Path) -> None:
    rgb = pattern(33, 21)[..., :3]
    data = encoded(Image.fromarray(rgb), "PNG")
    path = tmp_path / "ä b.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    with path.open("rb") as file:
        sources = [path, str(path), data, bytearray(data), memoryview(data), file, uri, rgb]
        sources += [
            Image.open(path),
            rgb.astype(np.uint16) * 257,
            rgb / 255,
            rgb.astype("f4") / 255,
        ]
        for source in sources:
            assert (pixels_of(source) == rgb).all()


def test_arrays_of_every_shape() -> None:
    rgba = pattern(10, 6)
    level = rgba[..., 0]
    assert (pixels_of(level) == grey(level)).all()
    assert (pixels_of(level[..., None]) == grey(level)).all()
    assert (pixels_of(level > 9) == grey((level > 9) * 255)).all()
    assert np.abs(pixels_of(rgba) - over_white(rgba[..., :3], rgba[..., 3])).max() <= 1
    assert (pixels_of(rgba[::-1, ::2, :3]) == rgba[::-1, ::2, :3]).all()


# ---- what is refused --------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is width x height and holds hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (b"hello, I am text" * 30, "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (png_header(40, 40), "cut short"),
        (png_header(0, 4), "damaged|no pixels|not a picture"),
        (png_header(9000, 9000), "more than 80,000,000"),
        (png_header(10000, 10000), "more than 80,000,000"),
        (png_header(60000, 60000), "more than 80,000,000"),
        ("/", "is a directory"),
        ("/no/such/picture.png", "no picture at"),
        ("a\0b.png", "cannot read"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png,abc", "not base64"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4, 3), np.inf, np.float32), "NaN"),
        (np.full((4, 4), 2.0), "0..1"),
        (np.zeros((3, 9, 9), np.uint8), "3 x 9 x 9"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.array(3), "shape"),
        (Image.new("RGB", (0, 4)), "no pixels"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "NaN"),
        (io.StringIO("text"), "binary"),
        (3, "no picture"),
    ],
)
def test_refused_with_one_line(source: images.Picture, message: str) -> None:
    with pytest.raises(PictureError, match=message) as error:
        load_picture(source)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_cut_or_flipped_files_are_typed_errors_or_pictures(kind: str) -> None:
    data = encoded(Image.fromarray(pattern(31, 23)[..., :3]), kind)
    rng = np.random.default_rng(5)
    for _ in range(60):
        broken = bytearray(data[: rng.integers(1, len(data))])
        for place in rng.integers(0, len(broken), rng.integers(0, 4)):
            broken[place] ^= 1 << rng.integers(0, 8)
        try:
            load_picture(bytes(broken))
        except PictureError:
            continue


def test_byte_cap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    path = tmp_path / "big.png"
    path.write_bytes(bytes(101))
    for source in (path, bytes(101), io.BytesIO(bytes(101)), "data:a;base64," + "A" * 200):
        with pytest.raises(PictureError, match="larger than"):
            load_picture(source)


@pytest.mark.parametrize("size", [(2000, 1500), (1100, 4001), (523, 521), (300, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpegs_are_decoded_smaller_and_look_the_same(
    size: tuple[int, int], mode: str
) -> None:
    x, y = np.meshgrid(np.linspace(0, 9, size[0]), np.linspace(0, 7, size[1]))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    whole = Image.fromarray((127 + 100 * waves).astype(np.uint8))
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    whole.convert(mode).save(file, "JPEG", quality=95, exif=exif)
    full = load_picture(file.getvalue())
    small = images.load_for(file.getvalue(), SPEC)
    assert min(small.size) >= min(2 * SPEC.size, *full.size)
    assert small.width / small.height == pytest.approx(size[1] / size[0], rel=0.01)  # turned
    assert (small.size == full.size) == (min(size) < 4 * SPEC.size)
    difference = np.abs(resize(full, SPEC).astype(int) - resize(small, SPEC))
    assert difference.max() <= 6 and difference.mean() < 1
