"""What a model needs on a small device: disk, start and memory, with graphs in ONNX and ORT format.

    python benchmarks/edge.py [--model DIR] [--runs 5] [--threads N] [--json FILE]

Every run is a process of its own that loads the model and asks each example picture one question;
ONNX and ORT format take turns. On stdout the quickest run and the median of memory: other programs
can only make a run slower. Peak memory is the largest resident set of the
process (Linux): weights that are mapped from a file count while they are in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from onnxruntime.capi import _pybind_state
from wheels import runtime_packages

from tinyalign.runtime import TinyAlign
from tinyalign.runtime.files import file_entry
from tinyalign.runtime.manifest import MANIFEST_NAME, read_manifest
from tinyalign.runtime.paths import default_model_dir
from tinyalign.runtime.threads import default_threads

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"
QUESTION = "What is this?"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", metavar="DIR", type=Path, default=default_model_dir())
    p.add_argument("--runs", metavar="N", type=int, default=5)
    p.add_argument("--threads", metavar="N", type=int, default=default_threads())
    p.add_argument("--json", metavar="FILE", type=Path)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.child:
        print(json.dumps(measure(options.model, options.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        small = minimal_copy(options.model, Path(folder) / "model")
        found: dict[str, Any] = {
            "threads": options.threads,
            "packages_mb": {name: installed_mb(name) for name in sorted(runtime_packages())},
            "operators": operators(small / "required_operators.config"),
            "onnx": {"files_mb": files_mb(options.model)},
            "ort": {"files_mb": files_mb(small)},
        }
        runs: dict[str, list[dict[str, float]]] = {"onnx": [], "ort": []}
        for _ in range(options.runs):
            for kind, place in (("onnx", options.model), ("ort", small)):
                runs[kind].append(start(place, options.threads))
    for kind, samples in runs.items():
        for name in samples[0]:
            best = min if name.endswith("_ms") else statistics.median
            found[kind][name] = round(best(sample[name] for sample in samples), 1)
    print(report(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def minimal_copy(model: Path, target: Path) -> Path:
    """The model with its graphs in ORT format, as `tinyalign-export --minimal` writes it."""
    from tinyalign.export.minimal import write_minimal  # not in the processes that are measured

    shutil.copytree(model, target)
    manifest = read_manifest(target)
    write_minimal(target, lambda _: None)
    names = sorted(path.name for path in target.iterdir() if path.name != MANIFEST_NAME)
    files = tuple(file_entry(target, name) for name in names)
    (target / MANIFEST_NAME).write_text(dataclasses.replace(manifest, files=files).to_json())
    return target


def start(model: Path, threads: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--child", "--model", model, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(path: Path, threads: int) -> dict[str, float]:
    """Times in ms and memory in MB of this process, from loading to the last answer."""
    with TinyAlign.load(path, threads) as model:
        loaded = peak_mb()
        paths = [path for path in sorted(PICTURES.iterdir()) if path.suffix != ".md"]
        answers = [model.ask(path, QUESTION) for path in paths]
        load_ms = model.load_ms
    return {
        "load_ms": load_ms,
        "first_token_ms": statistics.median(a.timings.first_token for a in answers[1:]),
        "peak_after_load_mb": loaded,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """Peak resident memory of this process (getrusage's would be its parent's, if that is more)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024 / 1e6


def files_mb(model: Path) -> dict[str, float]:
    """The sizes of a model directory's parts, and of all of it."""
    sizes = {path.name: path.stat().st_size / 1e6 for path in model.iterdir()}
    graphs = sorted(file.partition(".")[0] for file in sizes if file.endswith((".onnx", ".ort")))
    parts = {
        name: sum(size for file, size in sizes.items() if file.startswith(f"{name}."))
        for name in graphs
    }
    rest = {"embeddings": sizes["embeddings.bin"], "bank": sizes["bank.sqlite"]}
    return {
        name: round(size, 1) for name, size in {**parts, **rest, "all": sum(sizes.values())}.items()
    }


def installed_mb(package: str) -> float:
    """What an installed package takes on disk, without compiled Python files."""
    paths = [Path(str(file.locate())) for file in distribution(package).files or []]
    sizes = [path.stat().st_size for path in paths if path.suffix != ".pyc" and path.is_file()]
    return round(sum(sizes) / 1e6, 1)


def operators(listed: Path) -> dict[str, int]:
    """How many operators a build for the model keeps, and how many CPU kernels' the wheel has."""
    kept = {
        (line.split(";")[0], kind)
        for line in listed.read_text().splitlines()
        for kind in line.split(";")[2].split(",")
    }
    kernels: Any = _pybind_state.get_all_opkernel_def()
    every = {(k.domain, k.op_name) for k in kernels if k.provider == "CPUExecutionProvider"}
    return {"kept": len(kept), "all": len(every)}


def report(found: dict[str, Any]) -> str:
    """The tables of docs/edge.md."""
    lines = ["| | ONNX | ORT format |", "|---|---|---|"]
    for name in found["onnx"]["files_mb"]:
        row = [f"{found[kind]['files_mb'][name]:.1f} MB" for kind in ("onnx", "ort")]
        lines.append(f"| {name} | {' | '.join(row)} |")
    for name in ("load_ms", "first_token_ms", "peak_after_load_mb", "peak_mb"):
        row = [f"{found[kind][name]:.0f}" for kind in ("onnx", "ort")]
        lines.append(f"| {name} | {' | '.join(row)} |")
    packages = found["packages_mb"]
    lines += ["", "| package | MB |", "|---|---|"]
    lines += [f"| {name} | {size} |" for name, size in packages.items() if size >= 1]
    lines += [f"| all {len(packages)} | {sum(packages.values()):.0f} |", ""]
    count = found["operators"]
    lines.append(f"operators: {count['kept']} of the {count['all']} that the wheel has kernels for")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
