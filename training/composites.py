"""Generated scenes with exact answers: how many, where, what colour, is there.

Objects are the cut-outs of training (or held-out) pictures; nothing here needs a label by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from PIL import Image

from tinyalign.training.pictures import Picture
from tinyalign.training.views import (
    COLOURS,
    SHAPES,
    background,
    colour_words,
    place,
    plain_shape,
    rng_of,
)

Task = Literal["count", "position", "colour", "pair"]
POSITIONS: dict[str, tuple[float, float]] = {  # centre of the object
    "left": (0.24, 0.5), "right": (0.76, 0.5), "top": (0.5, 0.24), "bottom": (0.5, 0.76),
    "centre": (0.5, 0.5),
}  # fmt: skip
MAX_COUNT = 5


@dataclass(frozen=True)
class Scene:
    """What a generated picture shows. Boxes are (left, top, right, bottom) in 0..1 of the picture.

    `names` has one entry an object; in a pair the first is on the left.
    """

    id: str
    task: Task
    split: Literal["train", "held"]
    names: tuple[str, ...]
    pictures: tuple[str, ...]  # picture ids, or "shape/colour" of plain shapes
    boxes: tuple[tuple[float, float, float, float], ...]
    position: str = ""
    colour: str = ""

    @property
    def count(self) -> int:
        return len(self.boxes)


def make_scenes(pictures: Sequence[Picture], total: int, seed: str = "scenes") -> list[Scene]:
    """`total` scenes of each task in turn (half count), of the objects of both splits.

    About 12 % of the scenes are of held-out objects only.
    """
    sides = {side: [p for p in pictures if p.split == side] for side in ("train", "held")}
    tasks: tuple[Task, ...] = (
        "count",
        "position",
        "count",
        "colour",
        "count",
        "pair",
        "count",
        "position",
    )
    scenes = []
    for index in range(total):
        rng = rng_of(f"{seed}/{index}")
        split: Literal["train", "held"] = "held" if rng.random() < 0.12 else "train"
        scenes.append(
            _scene(f"composites/{index}", tasks[index % len(tasks)], split, sides[split], rng)
        )
    return scenes


def draw_scene(scene: Scene, cutout: Callable[[str], Image.Image]) -> Image.Image:
    """The scene as RGB [260, 260]; `cutout` gives the RGBA of a picture id."""
    rng = rng_of(f"draw/{scene.id}")
    canvas = background(rng)
    if scene.colour:  # the colour asked for must stand out from the ground
        while _ground_word(canvas) == scene.colour:
            canvas = background(rng)
    for picture, box in zip(scene.pictures, scene.boxes, strict=True):
        if picture.startswith("shape/"):
            _, shape, colour = picture.split("/")
            place(canvas, plain_shape(shape, colour), box, rng, turn=0)
        else:
            place(canvas, cutout(picture), box, rng, turn=8)
    return canvas


def _ground_word(canvas: Image.Image) -> str:
    import numpy as np

    pixel = np.asarray(canvas.resize((1, 1), Image.Resampling.BOX)).reshape(1, 3)
    return str(colour_words(pixel)[0])


def _scene(
    id: str, task: Task, split: Literal["train", "held"], pool: Sequence[Picture], rng: Random
) -> Scene:
    if task == "colour" or (task == "count" and rng.random() < 0.25):
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        number = 1 if task == "colour" else rng.randint(1, MAX_COUNT)
        boxes = scattered_boxes(number, rng) if number > 1 else (_centred(rng),)
        return Scene(id, task, split, (shape,) * number, (f"shape/{shape}/{colour}",) * number,
        boxes,
                     colour=colour)  # fmt: skip
    first = rng.choice(pool)
    if task == "count":
        number = rng.randint(1, MAX_COUNT)
        boxes = scattered_boxes(number, rng)
        return Scene(id, task, split, (first.name,) * number, (first.id,) * number, boxes)
    if task == "position":
        position = rng.choice(list(POSITIONS))
        x, y = POSITIONS[position]
        half = rng.uniform(0.15, 0.23)
        x, y = x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)
        box = (x - half, y - half, x + half, y + half)
        return Scene(id, task, split, (first.name,), (first.id,), (box,), position=position)
    second = rng.choice([p for p in pool if p.concept != first.concept])
    boxes = ((0.04, 0.2, 0.48, 0.8), (0.52, 0.2, 0.96, 0.8))
    return Scene(id, task, split, (first.name, second.name), (first.id, second.id), boxes)


def scattered_boxes(number: int, rng: Random) -> tuple[tuple[float, float, float, float], ...]:
    """Boxes of one size, each in its own cell of a 3x3 grid (2x2 up to three): none overlap."""
    grid = 2 if number <= 3 else 3
    cell = 1 / grid
    side = cell * rng.uniform(0.7, 0.9)
    boxes = []
    for place_ in rng.sample(range(grid * grid), number):
        row, column = divmod(place_, grid)
        left = column * cell + rng.uniform(0, cell - side)
        top = row * cell + rng.uniform(0, cell - side)
        boxes.append((left, top, left + side, top + side))
    return tuple(boxes)


def _centred(rng: Random) -> tuple[float, float, float, float]:
    side = rng.uniform(0.45, 0.75)
    left, top = rng.uniform(0.05, 0.95 - side), rng.uniform(0.05, 0.95 - side)
    return (left, top, left + side, top + side)
