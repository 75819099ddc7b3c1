"""Where the time of one question goes, and what the machine allows; `latency.py --profile`.

The budget goes from starting the process to the last token, with a picture and the default bank.
Parts before the model is loaded are measured as whole processes, the others inside one, each the
median of several. Two limits stand beside it:

    a run of the language model cannot be faster than reading its weights once, at the bandwidth
    measured here (all threads adding up 512 MiB);
    prefill cannot be faster than its multiplications, at the rate of float32 matrix products
    measured here (numpy's BLAS; int8 kernels may be faster than this).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown

from tinyalign.runtime import TinyAlign
from tinyalign.runtime.images import load_for, normalise, resize

PLOT = Path(__file__).parents[1] / "docs" / "profile.png"
REPEAT = 7
SINGLE = 1
ROWS = (SINGLE, 2, 4, 8, 16)


def milliseconds(work: Callable[[], Any], repeat: int = REPEAT) -> float:
    """Median time of some work, after one run that does not count."""
    work()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def python(code: str) -> float:
    """Milliseconds of a Python process."""
    return milliseconds(lambda: subprocess.run([sys.executable, "-c", code], check=True), 5)


def budget(directory: Path, threads: int, picture: Path, question: str) -> dict[str, float]:
    """Milliseconds of every part, in order."""
    bare = python("pass")
    imported = python("import tinyalign.runtime.model")
    load = (
        "from tinyalign.runtime import TinyAlign;"
        f"TinyAlign.load({str(directory)!r}, {threads}, banks={{}}).close()"
    )
    without, loaded = python(load.format("[]")), python(load.format("None"))
    model = TinyAlign.load(directory, threads)
    parts, spec = model.parts, model.parts.manifest.image
    pixels = resize(load_for(picture, spec), spec)
    batch = normalise(pixels, spec)[None]
    seen = model.encode(picture)
    hits = model.retrieve(seen, question)
    texts = [model._read_memory(hit.text) for hit in hits]
    key = model.key(seen, question)
    answer = model.ask(seen, question, max_tokens=32)
    rows = np.zeros((answer.prompt_tokens, parts.manifest.lm.width), np.float32)
    rows[:] = parts.embeddings[: len(rows)]

    def prefill() -> None:
        parts.lm.forward(parts.lm.new_state(len(rows) + 33), rows)

    found = {
        "start of Python": bare,
        "imports": imported - bare,
        "sessions, tokenizer": without - imported,
        "opening the bank": loaded - without,
        "picture file to pixels": milliseconds(lambda: resize(load_for(picture, spec), spec)),
        "vision encoder": milliseconds(lambda: parts.vision.run(["cells"], {"pixels": batch})),
        "connector": milliseconds(
            lambda: parts.connector.run(["image_tokens"], {"cells": seen.cells[None]})
        ),
        "key": milliseconds(lambda: model.key(seen, question)),
        "search": milliseconds(lambda: [bank.search(key, 3) for bank in model.banks]),
        "memory tokens": milliseconds(lambda: model._memory_tokens(hits, texts, "text")),
        f"prefill of {len(rows)} tokens": milliseconds(prefill),
        f"{answer.tokens} tokens in {answer.runs} runs": statistics.median(
            model.ask(seen, question, max_tokens=32).timings.decode for _ in range(REPEAT)
        ),
    }
    model.close()
    return found


def runs(directory: Path, threads: int, context: int = 128) -> dict[int, float]:
    """Milliseconds of a run of the language model over some rows, all with logits."""
    model = TinyAlign.load(directory, threads, [])
    lm, table = model.parts.lm, model.parts.embeddings
    state = lm.new_state(context + max(ROWS))
    lm.forward(state, table[:context].astype(np.float32))
    found: dict[int, list[float]] = {count: [] for count in ROWS}
    for _ in range(4 * REPEAT):
        for count in ROWS:
            state.length = context
            started = time.perf_counter()
            lm.forward(state, table[:count].astype(np.float32), tuple(range(count)))
            found[count].append(1e3 * (time.perf_counter() - started))
    return {count: statistics.median(times) for count, times in found.items()}


def limits(directory: Path, threads: int, prompt: int) -> dict[str, float]:
    """What the machine allows, in milliseconds, with what it is computed from."""
    weights = sum(file.stat().st_size for file in directory.glob("lm.onnx*"))
    big = np.ones((threads, 2**27 // threads), np.float32)  # 512 MiB
    with ThreadPoolExecutor(threads) as pool:
        read = milliseconds(lambda: list(pool.map(np.sum, big)))
    square = np.ones((1536, 1536), np.float32)
    product = milliseconds(lambda: square @ square)
    flops = 2 * 1536**3 / product / 1e6  # GFLOP/s
    return {
        "weights_mb": weights / 1e6,
        "read_gb_s": big.nbytes / read / 1e6,
        "run_ms": weights / (big.nbytes / read),
        "gflop_s": flops,
        "prefill_ms": 2 * weights * prompt / 1e6 / flops,  # a multiplication and an addition a byte
    }


def profile(directory: Path, threads: int, picture: Path, question: str) -> dict[str, Any]:
    """Everything; the plot goes to docs/profile.png."""
    parts = budget(directory, threads, picture, question)
    prompt = int(next(key for key in parts if key.startswith("prefill")).split()[2])
    result = {
        "budget": parts,
        "runs": runs(directory, threads),
        "limits": limits(directory, threads, prompt),
    }
    plot(parts)
    return result


def report(result: dict[str, Any]) -> str:
    """Tables of a profile."""
    total = sum(result["budget"].values())
    rows = [("part", "ms", "share"), ("---", "---:", "---:")]
    rows += [(name, f"{ms:.1f}", f"{ms / total:.0%}") for name, ms in result["budget"].items()]
    rows.append(("all", f"{total:.0f}", ""))
    found = result["limits"]
    one = result["runs"][SINGLE]
    lines = markdown(rows)
    lines += ["", *markdown([("rows in a run", *map(str, result["runs"])),
                             ("---",) * (1 + len(result["runs"])),
                             ("ms", *(f"{ms:.1f}" for ms in result["runs"].values())),
                             ("of a single row", *(f"{ms / one:.2f}" for ms in
                                                   result["runs"].values()))])]  # fmt: skip
    lines += [
        "",
        f"Reading the language model's {found['weights_mb']:.0f} MB once at "
        f"{found['read_gb_s']:.1f} GB/s: {found['run_ms']:.1f} ms; a run of one row takes "
        f"{one:.1f} ms.",
        f"The prompt's multiplications at {found['gflop_s']:.0f} GFLOP/s (float32 in BLAS): "
        f"{found['prefill_ms']:.0f} ms.",
    ]
    return "\n".join(lines)


def plot(parts: dict[str, float]) -> None:
    """The budget as one bar from left to right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 4))
    start = 0.0
    for number, ms in enumerate(parts.values()):
        axes.barh(number, ms, left=start, color="C0" if number < 4 else "C1")
        axes.text(start + ms + 4, number, f"{ms:.1f} ms", va="center", fontsize=8)
        start += ms
    axes.set_yticks(range(len(parts)), list(parts), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds since the process was started")
    axes.margins(x=0.08)
    axes.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
