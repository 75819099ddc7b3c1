"""Teach the model a thing from one picture, then ask about another view of it.

    python examples/teach.py

No training: the picture and its text become a memory in a bank file, and the next question uses it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image, ImageOps

from tinyalign.runtime import TinyAlign
from tinyalign.runtime.teach import create_bank

PICTURE = Path(__file__).parent / "pictures" / "octopus.webp"
TEXT = "This is a zorvin. Its owner is Mira. It is kept in the greenhouse."
QUESTIONS = ("What is this?", "Who owns it?", "Where is it kept?", "How much does it cost?")


def another_view(path: Path) -> Image.Image:
    """The thing mirrored, smaller, off centre and before another background."""
    thing = ImageOps.mirror(Image.open(path).convert("RGBA")).resize((150, 150))
    canvas = Image.new("RGBA", (260, 220), (214, 226, 240, 255))
    canvas.alpha_composite(thing, (70, 40))
    return canvas


def main() -> None:
    """Ask before and after teaching."""
    picture = another_view(PICTURE)
    with TinyAlign.load() as model:
        print("before:")
        for question in QUESTIONS:
            print(f"  {question}  {model.ask(picture, question).text}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mine.sqlite"
            with create_bank(model, path) as bank:
                bank.add([model.memory(PICTURE, TEXT)])
            with TinyAlign.load(banks=["default", path]) as taught:
                print(f"taught: {TEXT}")
                for question in QUESTIONS:
                    answer = taught.ask(picture, question)
                    used = ", ".join(f"{m.bank} {m.id} ({m.score:.2f})" for m in answer.memories)
                    print(f"  {question}  {answer.text}  [{used}]")


if __name__ == "__main__":
    main()
