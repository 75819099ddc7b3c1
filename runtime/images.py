"""From whatever holds a picture to the vision encoder's input, for training and the runtime alike.

``load_picture`` gives an upright 8-bit RGB picture, whatever came in:

- path, ``data:`` URI, bytes, open binary file, PIL image or numpy array;
- EXIF orientation applied; of an animation the first frame;
- transparency (RGBA, LA, palette, a transparent colour) laid over ``background``;
- 16-bit grey divided by 257; CMYK and the other modes as Pillow converts them, without profiles;
- arrays [H, W], [H, W, 1 | 2 | 3 | 4] of uint8, uint16 (divided by 257), bool, or float in 0..1.

Everything else is a :class:`PictureError` with one clear line, never a crash of a decoder.
"""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tinyalign.runtime.errors import PictureError
from tinyalign.runtime.manifest import ImageSpec

Picture: TypeAlias = (
    "str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[Any]"
)

MAX_BYTES = 256 << 20
MAX_PIXELS = 80_000_000  # below Pillow's own warning at 89 million; 240 MB as RGB

# Decoders that start no other program and know their files by their first bytes.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "ICO")
THUMBNAIL_SIDE = 48
LONGEST = 32  # times its short side: so much of a picture is looked at where it is cropped
WHITE = (255, 255, 255)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def load_for(source: Picture, spec: ImageSpec) -> Image.Image:
    """The picture as ``load_picture`` gives it, on the encoder's background.

    A JPEG file of more than twice the size that pictures are resized to is decoded at a half, a
    quarter or an eighth of its size, as long as twice that size is left each way: four times as
    fast for a photo of 12 MP.
    """
    return load_picture(source, spec.background, 2 * (spec.resize or spec.size))


def load_picture(
    source: Picture, background: tuple[int, int, int] = WHITE, least: int = 0
) -> Image.Image:
    """The picture upright, 8-bit RGB, without transparency. Raises PictureError.

    With ``least``, a JPEG file may come smaller, but with so many pixels each way at least.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the picture", background)
    if isinstance(source, np.ndarray):
        return _flatten(_from_array(source), background)
    data, name = _read(source)
    if not data:
        raise PictureError(f"{name} is empty")
    image = _open(data, name)
    if least and image.format == "JPEG":
        image.draft(None, (least, least))
    return _decode(image, name, background)


def thumbnail(picture: Image.Image, side: int = THUMBNAIL_SIDE) -> bytes:
    """An RGB picture as WebP of at most ``side`` pixels each way, for people to recognise it."""
    small = picture.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=70)
    return file.getvalue()


def preprocess(picture: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """The vision encoder's input f32 [3, S, S] from an RGB picture."""
    return normalise(resize(picture, spec), spec)


def resize(picture: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """The RGB picture as u8 [S, S, 3]: all of it squashed, or its centre, as the encoder wants."""
    width = height = size = spec.size
    if spec.resize is not None:
        picture = _shortened(picture)
        shortest = min(picture.size)
        width, height = (spec.resize * side // shortest for side in picture.size)
    # First across, then down: in one call, versions of Pillow differ in the order and so in pixels.
    resample = _RESAMPLE[spec.resample]
    across = picture.resize((width, picture.height), resample)
    pixels = np.asarray(across.resize((width, height), resample))  # [height, width, 3]
    left, top = (width - size) // 2, (height - size) // 2
    return pixels[top : top + size, left : left + size]


def _shortened(picture: Image.Image) -> Image.Image:
    """The middle of a picture that is very long: the rest would be cropped anyway, but first be
    resized to what no memory holds."""
    width, height = picture.size
    longest = LONGEST * min(width, height)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return picture.crop((left, top, width - left, height - top)) if left or top else picture


def normalise(pixels: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """u8 [S, S, 3] -> f32 [3, S, S], ``(rgb - mean) / scale`` by channel."""
    chw = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    chw -= np.array(spec.mean, np.float32)[:, None, None]
    chw /= np.array(spec.scale, np.float32)[:, None, None]
    return chw


def read_picture(file: BinaryIO, name: str) -> bytes:
    """All bytes of an open file up to the limit, not yet decoded; ``name`` is for messages."""
    data = _read_capped(file, name)
    if not data:
        raise PictureError(f"{name} is empty")
    return data


def _read(source: object) -> tuple[bytes, str]:
    """The encoded bytes of a source, and what to call it in messages."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if len(data) > MAX_BYTES:
            raise PictureError(_too_many_bytes("the picture"))
        return data, "the picture"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _from_data_uri(source), "the data URI's picture"
    if isinstance(source, str | Path):
        return _read_file(Path(source)), str(source)
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "the picture"))
        return _read_capped(source, name), name
    raise PictureError(
        f"{type(source).__name__} is no picture: give a path, bytes, an image or an array"
    )


def _read_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise PictureError(f"{path} is a directory, not a picture")
        with path.open("rb") as file:
            return _read_capped(file, str(path))
    except FileNotFoundError:
        raise PictureError(f"no picture at {path}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"cannot read {path}: {_reason(error)}") from None


def _read_capped(file: Any, name: str) -> bytes:
    try:
        data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise PictureError(f"cannot read {name}: {_reason(error)}") from None
    if not isinstance(data, bytes):
        raise PictureError(f"{name} was not opened as a binary file")
    if len(data) > MAX_BYTES:
        raise PictureError(_too_many_bytes(name))
    return data


def _too_many_bytes(name: str) -> str:
    return f"{name} is larger than {MAX_BYTES >> 20} MiB"


def _from_data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise PictureError("the data URI is not base64 (data:image/...;base64,...)")
    if len(body) > MAX_BYTES // 3 * 4:
        raise PictureError(_too_many_bytes("the data URI's picture"))
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("the data URI's base64 is damaged") from None


def _open(data: bytes, name: str) -> Image.Image:
    """Read the header only; no pixel is decoded yet."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise PictureError(
            f"{name} is not a picture this program reads (JPEG, PNG, WebP, ...)"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(f"{name} has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise whatever a damaged header leads to
        raise PictureError(f"{name} is damaged ({_reason(error)})") from None


def _decode(image: Image.Image, name: str, background: tuple[int, int, int]) -> Image.Image:
    """Check the declared size, decode, turn upright, convert to RGB."""
    width, height = image.size
    _check_size(width, height, name)
    try:
        image.load()
        return _flatten(_upright(image), background)
    except PictureError:
        raise
    except Exception as error:  # decoders raise whatever damaged data lead to
        raise PictureError(f"{name} is damaged or cut short ({_reason(error)})") from None


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{name} has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise PictureError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS:,}")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; a damaged EXIF block counts as none."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # the parser raises whatever the damage leads to
        turn = None
    return image if turn is None else image.transpose(turn)


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any mode to RGB over ``background``."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if image.mode == "La":  # premultiplied; Pillow converts it to LA only
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    under = Image.new("RGBA", rgba.size, (*background, 255))
    return Image.alpha_composite(under, rgba).convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (modes I;16*, and I read as such) or floats 0..1 (mode F) to mode L."""
    values = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray(_float_to_bytes(values))
    return Image.fromarray(_words_to_bytes(np.clip(values, 0, 65535).astype(np.uint16)))


def _from_array(array: NDArray[Any]) -> Image.Image:
    """[H, W] or [H, W, 1..4] of uint8, uint16, bool or float in 0..1."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (2, 3, 4)):
        shape = " x ".join(map(str, array.shape))
        raise PictureError(
            f"an array of shape {shape} is not a picture: give height x width x channels"
        )
    _check_size(array.shape[1], array.shape[0], "the array")
    if array.dtype == np.uint16:
        array = _words_to_bytes(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        array = _float_to_bytes(array)
    elif array.dtype != np.uint8:
        raise PictureError(
            f"an array of {array.dtype} is not a picture: give uint8, or floats in 0..1"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _words_to_bytes(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """0..65535 -> 0..255, rounded."""
    rounded: NDArray[np.uint8] = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return rounded


def _float_to_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """0..1 -> 0..255, rounded."""
    if not np.isfinite(values).all():
        raise PictureError("the picture holds NaN or infinite values")
    if values.min() < 0 or values.max() > 1:
        raise PictureError(
            f"float pixels must lie in 0..1, not {values.min():.4g}..{values.max():.4g}"
        )
    scaled: NDArray[np.uint8] = np.rint(values * 255).astype(np.uint8)
    return scaled


def _reason(error: BaseException) -> str:
    """One line of an exception; OSError's own words without number and path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
