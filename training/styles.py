"""The same things shown differently: emoji of other makers, and furniture from another side.

What the key head learns from (`key_head.py`). The part of an id behind its first "/" names the
thing: `emoji/1f34e`, `noto/1f34e`, `twemoji/1f34e` and `flat/1f34e` show one, as do
`furniture/Scopia/12` and `turned/Scopia/12/50`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from tinyalign.training.pictures import Picture, emoji, furniture, furniture_dir, svg_image
from tinyalign.training.sources import unpack
from tinyalign.training.turned import draw_turned

# source -> (package, licence, maker)
EMOJI_STYLES = {
    "noto": ("@iconify-json/noto", "Apache-2.0", "Google"),
    "twemoji": ("@iconify-json/twemoji", "CC-BY-4.0", "Twitter"),
    "flat": ("@iconify-json/fluent-emoji-flat", "MIT", "Microsoft"),
}
YAWS = (50, -65)  # degrees; the catalogue's own icons show most things from about -30
PITCH = 20


def thing_of(id: str) -> str:
    """What a picture shows, the same for all styles and sides of it."""
    source, _, rest = id.partition("/")
    return rest.rpartition("/")[0] if source == "turned" else rest


def styled_emoji(source: str, cache: Path | None = None) -> list[Picture]:
    """The emoji of `pictures.emoji` that another maker has drawn as well."""
    package, licence, maker = EMOJI_STYLES[source]
    names = _names(package, cache)
    return [
        replace(picture, id=f"{source}/{code}", source=source, licence=licence, creator=maker,
                file=names[code])
        for picture in emoji(cache)
        if (code := thing_of(picture.id)) in names
    ]  # fmt: skip


def turned_furniture(cache: Path | None = None) -> list[Picture]:
    """The models of `pictures.furniture`, once for each of YAWS."""
    models = dict(_models(cache))
    return [
        replace(picture, id=f"turned/{thing_of(picture.id)}/{yaw}", source="turned",
                file=f"{models[picture.id]}@{yaw}")
        for picture in furniture(cache)
        if picture.id in models
        for yaw in YAWS
    ]  # fmt: skip


def read_styled(picture: Picture, cache: Path | None = None) -> Image.Image:
    """The picture as RGBA; ValueError where a model cannot be drawn."""
    if picture.source == "turned":
        model, _, yaw = picture.file.rpartition("@")
        archive, member = model.split("!")
        return draw_turned(furniture_dir(cache) / archive, member, float(yaw), PITCH)
    icons = _icons(EMOJI_STYLES[picture.source][0], cache)
    body = icons["icons"][picture.file]["body"]
    side = icons["width"], icons["height"]
    return svg_image(
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {side[0]} {side[1]}">{body}</svg>'
    )


@lru_cache(maxsize=3)
def _icons(package: str, cache: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (unpack(package, cache) / "package" / "icons.json").read_text(encoding="utf-8")
    )
    size = {"width": found.get("width", 16), "height": found.get("height", 16)}
    return found | size


def _names(package: str, cache: Path | None) -> dict[str, str]:
    """Icon names by code, as `pictures.emoji` writes codes."""
    chars = json.loads((unpack(package, cache) / "package" / "chars.json").read_text())
    icons = _icons(package, cache)["icons"]
    return {
        "-".join(part for part in code.split("-") if part != "fe0f"): name
        for code, name in chars.items()
        if name in icons
    }


def _models(cache: Path | None) -> Iterator[tuple[str, str]]:
    """(picture id, "archive!member") of every piece of furniture that has a model."""
    for archive in sorted(furniture_dir(cache).glob("*.sh3f")):
        with zipfile.ZipFile(archive) as stored:
            text = stored.read("PluginFurnitureCatalog.properties").decode("latin-1")
        for number, member in re.findall(r"^model#(\d+)=/?(.*)$", text, re.M):
            yield f"furniture/{archive.stem}/{number}", f"{archive.name}!{member.strip()}"
