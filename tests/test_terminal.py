"""Pictures drawn on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image

from tinyalign.runtime.errors import PictureError
from tinyalign.runtime.terminal import can_draw, picture_lines


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_every_pixel_is_a_half_block() -> None:
    picture = Image.new("RGB", (2, 3), (1, 2, 3))
    picture.putpixel((0, 1), (255, 0, 0))
    picture.putpixel((1, 2), (0, 0, 255))
    same = "\x1b[38;2;1;2;3m"
    assert picture_lines(encoded(picture), 80) == [
        f"{same}\x1b[48;2;255;0;0m▀{same}\x1b[48;2;1;2;3m▀\x1b[0m",
        f"{same}\x1b[49m▀\x1b[38;2;0;0;255m\x1b[49m▀\x1b[0m",  # the last line has upper halves only
    ]


def test_colours_are_told_only_where_they_change() -> None:
    (line,) = picture_lines(encoded(Image.new("RGB", (9, 2), (7, 8, 9))), 80)
    assert line == "\x1b[38;2;7;8;9m\x1b[48;2;7;8;9m" + "▀" * 9 + "\x1b[0m"


@pytest.mark.parametrize(("width", "columns", "rows"), [(80, 48, 12), (24, 24, 6), (1, 1, 1)])
def test_it_fits_the_terminal(width: int, columns: int, rows: int) -> None:
    lines = picture_lines(encoded(Image.linear_gradient("L").resize((48, 24))), width)
    assert len(lines) == rows
    assert {len(re.sub("\x1b[^m]*m", "", line)) for line in lines} == {columns}


def test_what_is_no_picture() -> None:
    with pytest.raises(PictureError):
        picture_lines(b"no picture", 80)


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_when_to_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(io.BytesIO(), "utf-8")
    assert can_draw(terminal)
    assert not can_draw(io.StringIO())
    assert not can_draw(Terminal(io.BytesIO(), "latin-1"))
    monkeypatch.setenv("TERM", "dumb")
    assert not can_draw(terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not can_draw(terminal)
