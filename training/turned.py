"""3D models drawn from another side: a small painter (farthest face first, lit, flat colours)."""

from __future__ import annotations

import io
import math
import posixpath
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 300  # pixels of the longer side
SMOOTHING = 2  # drawn so many times larger
MAX_FACES = 150_000  # larger models take seconds to draw
LIGHT = np.array([0.35, 0.8, 0.5]) / np.linalg.norm([0.35, 0.8, 0.5])
GREY = (190, 190, 190)

Colour = tuple[int, int, int]


def draw_turned(archive: Path, member: str, yaw: float, pitch: float) -> Image.Image:
    """A Wavefront OBJ inside a zip as a cut-out RGBA, turned by degrees around its upright axis.

    Raises ValueError where there is nothing to draw or too much.
    """
    with zipfile.ZipFile(archive) as stored:
        vertices, faces, materials = _read_model(stored, member)
    if not 0 < len(faces) <= MAX_FACES:
        raise ValueError(f"{member} has {len(faces)} faces")
    points = _turned(vertices, yaw, pitch)  # [V, 3], y up, z towards the eye
    low, high = points.min(0), points.max(0)
    scale = SIDE * SMOOTHING / max(float(max(high[:2] - low[:2])), 1e-9)
    flat = (points[:, :2] - low[:2]) * scale
    flat[:, 1] = (high[1] - low[1]) * scale - flat[:, 1]  # pixels count downwards
    size = tuple(int(side) + 2 for side in (high[:2] - low[:2]) * scale)
    canvas = Image.new("RGBA", (size[0], size[1]), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    depth = np.array([points[face, 2].mean() for face, _ in faces])
    corners = points[[face[:3] for face, _ in faces]]  # [F, 3, 3]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(normals, axis=1)
    shades = 0.55 + 0.45 * np.abs(normals @ LIGHT) / np.maximum(lengths, 1e-12)
    for number in np.argsort(depth):
        face, material = faces[number]
        if lengths[number] < 1e-12:
            continue
        colour = tuple(int(part * shades[number]) for part in materials.get(material, GREY))
        draw.polygon([(float(x), float(y)) for x, y in flat[face]], fill=(*colour, 255))
    return canvas.resize(
        (max(1, size[0] // SMOOTHING), max(1, size[1] // SMOOTHING)), Image.Resampling.LANCZOS
    )


def _turned(vertices: NDArray[np.float64], yaw: float, pitch: float) -> NDArray[np.float64]:
    a, b = math.radians(yaw), math.radians(pitch)
    around = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    turned: NDArray[np.float64] = vertices @ around.T @ tilt.T
    return turned


def _read_model(
    stored: zipfile.ZipFile, member: str
) -> tuple[NDArray[np.float64], list[tuple[list[int], str]], dict[str, Colour]]:
    """Vertices [V, 3], faces (vertex numbers, material) and the materials' colours."""
    vertices: list[list[float]] = []
    faces: list[tuple[list[int], str]] = []
    materials: dict[str, Colour] = {}
    material = ""
    for line in stored.read(member).decode("latin-1").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "v":
            vertices.append([float(part) for part in rest.split()[:3]])
        elif word == "f":
            numbers = [int(corner.split("/")[0]) for corner in rest.split()]
            face = [n - 1 if n > 0 else len(vertices) + n for n in numbers]
            if len(face) > 2:
                faces.append((face, material))
        elif word == "usemtl":
            material = rest.strip()
        elif word == "mtllib":
            materials |= _colours(stored, posixpath.join(posixpath.dirname(member), rest.strip()))
    return np.array(vertices, dtype=np.float64).reshape(-1, 3), faces, materials


def _colours(stored: zipfile.ZipFile, member: str) -> dict[str, Colour]:
    """Materials' colours from an MTL file: the mean of the texture where there is one."""
    if member not in stored.namelist():
        return {}
    colours: dict[str, Colour] = {}
    name = ""
    for line in stored.read(member).decode("latin-1").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "newmtl":
            name = rest.strip()
        elif word == "Kd":
            red, green, blue = (min(255, int(255 * float(part))) for part in rest.split()[:3])
            colours[name] = (red, green, blue)
        elif word == "map_Kd":
            texture = posixpath.join(posixpath.dirname(member), rest.strip())
            if texture in stored.namelist():
                with Image.open(io.BytesIO(stored.read(texture))) as image:
                    mean = np.asarray(image.convert("RGB").resize((16, 16))).reshape(-1, 3).mean(0)
                colours[name] = (int(mean[0]), int(mean[1]), int(mean[2]))
    return colours
