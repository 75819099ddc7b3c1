"""A picture drawn with coloured half blocks, for terminals of 24-bit colour."""

from __future__ import annotations

import os
from typing import TextIO

import numpy as np

from tinyalign.runtime.images import load_picture

UPPER_HALF = "▀"  # its upper half has the text's colour, its lower half the background's
RESET = "\x1b[0m"


def can_draw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that may be drawn on (https://no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        UPPER_HALF.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def picture_lines(data: bytes, width: int) -> list[str]:
    """An encoded picture as lines of at most ``width`` characters, never larger than it is.

    A character shows two pixels, one above the other. Raises PictureError.
    """
    picture = load_picture(data)
    picture.thumbnail((max(1, width), picture.height))
    pixels = np.asarray(picture)  # u8 [H, W, 3]
    lines = []
    for y in range(0, len(pixels), 2):
        line, before = "", ""
        for x in range(pixels.shape[1]):
            colours = _colour(38, pixels[y, x])
            colours += _colour(48, pixels[y + 1, x]) if y + 1 < len(pixels) else "\x1b[49m"
            line += (colours if colours != before else "") + UPPER_HALF
            before = colours
        lines.append(line + RESET)
    return lines


def _colour(layer: int, rgb: np.ndarray) -> str:
    """The escape sequence for a colour of the text (layer 38) or the background (48)."""
    red, green, blue = rgb.tolist()
    return f"\x1b[{layer};2;{red};{green};{blue}m"
