"""Views of a cut-out: over a made-up background, at another size, place, turn and brightness."""

from __future__ import annotations

import hashlib
import io
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance

SIZE = 260

# Colour words and a typical RGB value of each (for plain shapes).
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36), "orange": (245, 134, 24), "yellow": (248, 214, 28), "green": (40, 160,
    62),
    "blue": (36, 92, 214), "purple": (128, 48, 170), "pink": (248, 130, 188), "brown": (122, 74,
    36),
    "black": (18, 18, 20), "grey": (128, 128, 130), "white": (250, 250, 250),
}  # fmt: skip
CLEAR_CUT = 0.6  # share of the opaque pixels a colour word needs


def rng_of(key: str) -> Random:
    """A random generator fixed by a key, the same on every machine."""
    return Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def trim(cutout: Image.Image) -> Image.Image:
    """A cut-out RGBA without its fully transparent border."""
    box = cutout.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    return cutout.crop(box) if box else cutout


def has_alpha(picture: Image.Image) -> bool:
    """True when a visible share (3 %) of an RGBA picture is transparent: a cut-out."""
    alpha = np.asarray(picture.getchannel("A"))
    return bool((alpha < 32).mean() > 0.03)


def background(rng: Random, size: int = SIZE) -> Image.Image:
    """A plain colour, a gradient or soft noise as RGB [size, size]; mostly light."""
    kind = rng.random()
    first, second = _soft_colour(rng), _soft_colour(rng)
    if kind < 0.4:
        return Image.new("RGB", (size, size), first)
    if kind < 0.7:
        angle = rng.random() * 2 * np.pi
        y, x = np.mgrid[0:size, 0:size] / (size - 1)
        t = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        t = np.clip(t / 1.4 + 0.5, 0, 1)[..., None]
        return Image.fromarray((np.array(first) * (1 - t) + np.array(second) * t).astype(np.uint8))
    side = rng.choice((3, 5, 9, 17))
    noise = np.random.default_rng(rng.getrandbits(32)).random((side, side, 1))
    mixed = np.array(first) * (1 - noise) + np.array(second) * noise
    small = Image.fromarray(mixed.astype(np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def place(
    canvas: Image.Image, cutout: Image.Image, box: tuple[float, float, float, float], rng: Random,
    flip: bool = True, turn: float = 12.0,
) -> None:  # fmt: skip
    """Paste a cut-out, whole, centred in a box (left, top, right, bottom in 0..1)."""
    if flip and rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cutout = trim(cutout)
    left, top, right, bottom = (side * canvas.width for side in box)
    scale = min((right - left) / cutout.width, (bottom - top) / cutout.height)
    wide = max(4, round(cutout.width * scale * rng.uniform(0.92, 1.0)))
    high = max(4, round(cutout.height * scale * rng.uniform(0.92, 1.0)))
    cutout = cutout.resize((wide, high), Image.Resampling.BICUBIC)
    if turn:
        cutout = cutout.rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC, expand=True)
    x = round((left + right - cutout.width) / 2)
    y = round((top + bottom - cutout.height) / 2)
    canvas.paste(cutout, (x, y), cutout)


def view(cutout: Image.Image, rng: Random, gentle: bool = False) -> Image.Image:
    """One augmented view RGB [260, 260] of an RGBA picture; `gentle` varies size and place less.

    A picture without transparency fills the view and is only cropped a little, flipped and lit.
    """
    if not has_alpha(cutout):
        return _lit(_cropped(cutout.convert("RGB"), rng), rng)
    canvas = (
        background(rng)
        if not gentle or rng.random() < 0.5
        else Image.new("RGB", (SIZE,) * 2, "white")
    )
    side = rng.uniform(0.8, 0.98) if gentle else rng.uniform(0.5, 0.98)
    left, top = rng.uniform(0, 1 - side), rng.uniform(0, 1 - side)
    place(canvas, cutout, (left, top, left + side, top + side), rng, turn=6 if gentle else 12)
    return _lit(canvas, rng)


def thumbnail(cutout: Image.Image, side: int = 48) -> bytes:
    """A small WebP (about 700 bytes) of the picture over white."""
    picture = Image.new("RGB", cutout.size, "white")
    picture.paste(cutout, (0, 0), cutout)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=55, method=4)
    return stream.getvalue()


def unmirrored_view(picture: Image.Image, rng: Random) -> Image.Image:
    """One augmented view RGB [260, 260] of a whole RGB picture in which left stays left."""
    return _lit(_cropped(picture, rng, mirror=False), rng)


def dominant_colour(cutout: Image.Image) -> str:
    """The colour word most opaque pixels of an RGBA picture have, or "" when none is clear-cut."""
    small = cutout.copy()
    small.thumbnail((96, 96))
    pixels = np.asarray(small).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 160][:, :3]
    if len(pixels) < 60:
        return ""
    words = colour_words(pixels)
    values, counts = np.unique(words, return_counts=True)
    best = int(counts.argmax())
    return str(values[best]) if counts[best] >= CLEAR_CUT * len(words) else ""


def colour_words(rgb: NDArray[np.uint8]) -> NDArray[np.str_]:
    """The colour word of every pixel, u8 [N, 3] -> str [N] ("" for what has no plain word)."""
    unit = rgb.astype(np.float32) / 255
    high, low = unit.max(1), unit.min(1)
    spread = high - low
    r, g, b = unit.T
    safe = np.where(spread == 0, 1, spread)
    hue = np.select(
        [high == r, high == g], [((g - b) / safe) % 6, (b - r) / safe + 2], (r - g) / safe + 4
    ) * 60  # fmt: skip
    saturation = np.where(high == 0, 0, spread / np.where(high == 0, 1, high))
    grey = saturation < 0.16
    reddish = (hue < 14) | (hue >= 338)
    dull = (saturation < 0.56) & (high < 0.72)
    pale = (saturation < 0.5) & (high > 0.72)
    chosen = np.select(
        [
            (high < 0.2) | ((high < 0.38) & (saturation < 0.4)),
            grey & (high > 0.88), grey,
            reddish & pale & ((hue >= 330) | (hue < 8)),
            ((hue < 40) | (hue >= 338)) & dull,
            ((hue < 40) | (hue >= 338)) & pale,
            (hue < 12) | (hue >= 346) | ((hue >= 336) & (saturation > 0.66)),  # and shaded red
            (hue < 40) & (high < 0.66),
            hue < 36,
            (hue < 66) & (high > 0.55),
            hue < 165, hue < 255, hue < 292, high > 0.6,
        ],
        ["black", "white", "grey", "pink", "brown", "", "red", "brown", "orange", "yellow", "green",
         "blue", "purple", "pink"],
        "purple",
    )  # fmt: skip
    words: NDArray[np.str_] = chosen
    return words


def plain_shape(shape: str, colour: str, side: int = 200) -> Image.Image:
    """A one-colour circle, square, triangle, diamond or star as a cut-out RGBA."""
    image = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(image)
    fill = (*COLOURS[colour], 255)
    last = side - 1
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill)
    elif shape == "square":
        draw.rectangle((0, 0, last, last), fill)
    elif shape == "triangle":
        draw.polygon(((side / 2, 0), (last, last), (0, last)), fill)
    elif shape == "diamond":
        draw.polygon(((side / 2, 0), (last, side / 2), (side / 2, last), (0, side / 2)), fill)
    else:  # star
        angles = [np.pi * (i / 5 - 0.5) for i in range(10)]
        radii = [side / 2 if i % 2 == 0 else side / 4.6 for i in range(10)]
        middle = side / 2
        points = [
            (middle + q * np.cos(a), middle + q * np.sin(a))
            for a, q in zip(angles, radii, strict=True)
        ]
        draw.polygon(points, fill)
    return image


SHAPES = ("circle", "square", "triangle", "diamond", "star")


def _soft_colour(rng: Random) -> tuple[int, int, int]:
    base = rng.randint(150, 250) if rng.random() < 0.75 else rng.randint(40, 150)
    red, green, blue = (min(255, max(0, base + rng.randint(-30, 30))) for _ in range(3))
    return red, green, blue


def _cropped(picture: Image.Image, rng: Random, mirror: bool = True) -> Image.Image:
    keep = rng.uniform(0.85, 1.0)
    wide, high = picture.width * keep, picture.height * keep
    left, top = rng.uniform(0, picture.width - wide), rng.uniform(0, picture.height - high)
    if mirror and rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = (left, top, left + wide, top + high)
    return picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)


def _lit(picture: Image.Image, rng: Random) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(rng.uniform(0.85, 1.12))
