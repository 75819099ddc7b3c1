"""How many pictures a second `tinyalign-bank add` adds, and what it spends its time on.

    python benchmarks/add.py [--json FILE]

The pictures are JPEGs of 1 to 3 million pixels like a camera's: those of examples/pictures
enlarged, turned a little and with noise, the same in every run. The whole command adds a folder of
them, with and without Ray. Then its parts are timed in this process: reading and shrinking one
picture after another on one thread, the encoder on all threads for several sizes of batch. Markdown
on stdout, everything as JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from latency import machine
from PIL import Image

from tinyalign.runtime import TinyAlign
from tinyalign.runtime.images import load_picture, normalise, resize, thumbnail
from tinyalign.runtime.model import ENCODE_BATCH
from tinyalign.runtime.teach import create_bank
from tinyalign.runtime.threads import default_threads

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"
COMMAND = Path(sys.executable).with_name("tinyalign-bank")
BATCHES = (1, 2, 4, 8, 16, 32)
SAMPLE = 64  # photographs that are timed part by part
ROUNDS = 3  # over them for each size of batch, in turns
In = TypeVar("In")
Out = TypeVar("Out")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--pictures", metavar="N", type=int, default=320)
    p.add_argument("--runs", metavar="N", type=int, default=3, help="of each command")
    p.add_argument("--json", metavar="FILE", type=Path, help="write everything measured here")
    options = p.parse_args()
    commands: dict[str, list[str]] = {"one process": []}
    if find_spec("ray"):
        commands["Ray"] = ["--ray"]
    with tempfile.TemporaryDirectory() as folder:
        photographs = make_photographs(Path(folder, "photographs"), options.pictures)
        seconds = {
            name: [add_seconds(Path(folder), extra) for _ in range(options.runs)]
            for name, extra in commands.items()
        }
        pixels = [Image.open(path).size for path in photographs]
        result = {
            "machine": machine(default_threads()),
            "pictures": len(photographs),
            "megapixels": round(sum(w * h for w, h in pixels) / len(pixels) / 1e6, 2),
            "megabytes": round(sum(p.stat().st_size for p in photographs) / len(pixels) / 1e6, 2),
            "seconds": seconds,
            **time_parts(photographs[:SAMPLE], Path(folder, "parts.sqlite")),
        }
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def make_photographs(folder: Path, count: int) -> list[Path]:
    """JPEGs of 1 to 3 million pixels, quality 90."""
    folder.mkdir()
    names = sorted(p for p in PICTURES.iterdir() if p.suffix in (".jpg", ".png", ".webp"))
    small = [load_picture(name) for name in names]
    rng = np.random.default_rng(0)
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        picture = small[number % len(small)]
        scale = np.sqrt(rng.uniform(1e6, 3e6) / (picture.width * picture.height))
        large = picture.resize((int(picture.width * scale), int(picture.height * scale)))
        turned = large.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 4, (turned.height, turned.width, 1))
        noisy = np.clip(np.asarray(turned) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path, quality=90)
    return paths


def add_seconds(folder: Path, extra: Sequence[str]) -> float:
    """Seconds that the whole command takes for the folder of photographs."""
    bank = folder / "mine.sqlite"
    command = [COMMAND, "add", "photographs", "--text-from-name", "--bank", bank.name, *extra]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    taken = time.perf_counter() - started
    bank.unlink()
    return round(taken, 3)


def time_parts(photographs: Sequence[Path], bank: Path) -> dict[str, Any]:
    """Milliseconds a picture of every part, and of the encoder by size of batch."""
    with TinyAlign.load(banks=[], lm=False) as model:
        spec, threads = model.parts.manifest.image, model.parts.threads
        parts: dict[str, float] = {}

        def timed(name: str, work: Callable[[In], Out], inputs: Iterable[In]) -> list[Out]:
            started = time.perf_counter()
            outputs = [work(item) for item in inputs]
            parts[name] = round(1e3 * (time.perf_counter() - started) / len(outputs), 2)
            return outputs

        small = []
        reading = {"read": 0.0, "shrink": 0.0, "thumbnail": 0.0}
        for path in photographs:  # one by one: many large pictures do not stay in memory
            picture = timed("read", load_picture, [path])[0]
            small += timed("shrink", lambda p: resize(p, spec), [picture])
            timed("thumbnail", thumbnail, [picture])
            reading = {name: reading[name] + parts[name] for name in reading}
        parts |= {name: round(value / len(small), 2) for name, value in reading.items()}

        encoder = encoder_by_batch(model, np.stack([normalise(p, spec) for p in small]))
        seen = timed("encode", model.encode_many, [small])[0]
        parts["encode"] = round(parts["encode"] / len(small), 2)
        memories = timed("latents and key", lambda s: model.memory(s, "This is a thing."), seen)
        with create_bank(model, bank) as created:
            timed("write", lambda start: created.add(memories[start : start + 32]), (0, 32))
        parts["write"] = round(parts["write"] / 32, 2)
    return {"threads": threads, "ms": parts, "encoder_ms_by_batch": encoder}


def encoder_by_batch(model: TinyAlign, pixels: np.ndarray) -> dict[int, float]:
    """Milliseconds a picture in the vision encoder alone, medians over rounds taken in turns."""
    taken: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in range(ROUNDS):
        for size in BATCHES:
            started = time.perf_counter()
            for start in range(0, len(pixels), size):
                model.parts.vision.run(["cells"], {"pixels": pixels[start : start + size]})
            taken[size].append(1e3 * (time.perf_counter() - started) / len(pixels))
    return {size: round(statistics.median(values), 2) for size, values in taken.items()}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    count, ms = result["pictures"], result["ms"]
    lines = [
        f"{count} JPEGs of {result['megapixels']} megapixels and {result['megabytes']} MB on "
        f"average, {result['machine']['threads']} threads, {result['machine']['cpu']}",
        "",
        "| `tinyalign-bank add` | seconds | pictures/s |",
        "|---|---:|---:|",
    ]
    for name, values in result["seconds"].items():
        taken = statistics.median(values)
        lines.append(f"| {name} | {taken:.1f} | {count / taken:.1f} |")
    lines += ["", "| part | ms a picture | threads |", "|---|---:|---:|"]
    for name, value in ms.items():
        on = result["threads"] if name == "encode" else 1
        lines.append(f"| {name} | {value:.1f} | {on} |")
    batches = result["encoder_ms_by_batch"]
    head = " | ".join(f"{size}" for size in batches)
    body = " | ".join(f"{value:.1f}" for value in batches.values())
    lines += ["", f"| batch (used: {ENCODE_BATCH}) | {head} |", "|---|" + "---:|" * len(batches)]
    lines += [f"| encoder, ms a picture | {body} |"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
