"""Run the tour in docs/memory-bank.md again and write down what its commands print.

    python examples/tour.py

The tour is the section "Teach it your own things". In its console blocks every line that starts
with "$ " is a command; what stands below it is replaced by what it prints now. The commands run one
after another in a folder with the pictures that docs/tour.png shows, which is made anew too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory-bank.md"
SECTION = re.compile(r"(?<=^## Teach it your own things\n).*?(?=^## )", re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
PICTURES = ROOT / "examples" / "pictures"
VIEWS = {  # of a taught picture: the name of the other view, and the colour behind the thing
    "octopus.webp": ("shelf.png", (214, 226, 240)),
    "scissors.png": ("drawer.png", (233, 220, 196)),
    "guitar.png": ("wall.png", (205, 225, 200)),
}
ITEMS = (
    ("scissors.png", "These are the fabric scissors. Their owner is Bo.", {"room": "study"}),
    ("guitar.png", "This is a harvin. Its part number is KX-204.", {"room": "den"}),
)


def main() -> None:
    page = PAGE.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder))
        lines = [json.dumps({"image": i, "text": t, "metadata": m}) + "\n" for i, t, m in ITEMS]
        Path(folder, "items.jsonl").write_text("".join(lines))
        text = SECTION.sub(
            lambda section: CONSOLE.sub(lambda block: console(block[0], folder), section[0]), page
        )
    PAGE.write_text(text, "utf-8")


def make_pictures(folder: Path) -> None:
    """The taught pictures, other views of them, and docs/tour.png with the one above the other."""
    sheet = Image.new("RGB", (3 * 200, 2 * 170), "white")
    for column, (name, (view, background)) in enumerate(VIEWS.items()):
        (folder / name).write_bytes((PICTURES / name).read_bytes())
        thing = Image.open(PICTURES / name).convert("RGBA")
        other = another_view(thing, background)
        other.save(folder / view)
        for row, picture in enumerate((thing, other)):
            picture = ImageOps.contain(picture.convert("RGBA"), (190, 160))
            corner = (column * 200 + (200 - picture.width) // 2, row * 170 + 5)
            sheet.paste(picture, corner, picture)
    (folder / "cat.jpg").write_bytes((PICTURES / "cat.jpg").read_bytes())
    sheet.quantize(128).save(ROOT / "docs" / "tour.png", optimize=True)


def another_view(thing: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The thing mirrored, smaller, turned a little, off centre and before another background."""
    thing = ImageOps.contain(ImageOps.mirror(thing), (150, 150))
    thing = thing.rotate(8, Image.Resampling.BICUBIC, expand=True)
    canvas = Image.new("RGBA", (260, 220), (*background, 255))
    canvas.alpha_composite(thing, (70, 40))
    return canvas.convert("RGB")


def console(block: str, folder: str) -> str:
    """A console block with what its commands print, in the order of a terminal."""
    lines = []
    for command in re.findall(r"^\$ .*$", block, re.MULTILINE):
        place = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            command[2:],
            shell=True,
            cwd=folder,
            env=os.environ | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{command[2:]}: {done.stdout}")
        lines += [command, *done.stdout.splitlines()]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
