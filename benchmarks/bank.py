"""Banks of a thousand to a million memories, beside exact numpy, faiss and usearch.

    python benchmarks/bank.py [--sizes 1000 10000 100000] [--again]

For each size and engine: building (all cores), then in turns and each time in a fresh process:
opening with the first search, searching the 5 nearest (one thread) and memory. `bank` is the whole
`Bank.search`, with texts and latents read from the file; `bank index` only the search in its
index. The peers get the same graph parameters. recall@5 is the share of what is found that scores
as high as the fifth of exact search. Half of the queries are pictures unlike any in the bank, half
another view of one; "view found" is the share of these whose nearest memory is found. What the
keys are stands in `bank_keys.py`: real ones, and beyond them clusters around real ones.

Results are kept in benchmarks/results/bank.json; a size that is there is not measured again but
with --again. The table goes to stdout and the plot to docs/bank.png. It needs the feature cache
(`tinyalign-train --until prepare`); peers: pip install -e ".[bench]".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bank_engines
import bank_keys
import numpy as np

from tinyalign.bank import Bank
from tinyalign.training.parts import DEFAULT_WEIGHTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bank.json"
PLOT = ROOT / "docs" / "bank.png"
SEED = 0
ROUNDS = 5
# Tuning variables for OpenBLAS that fit one machine and slow numpy on another.
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--sizes", metavar="N", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    p.add_argument("--queries", metavar="N", type=int, default=1000)
    p.add_argument("--engines", nargs="+", choices=bank_engines.ENGINES, metavar="NAME")
    p.add_argument("--again", action="store_true", help="measure what is in the results too")
    p.add_argument("--work", metavar="DIR", type=Path, default=ROOT / "build" / "bank-benchmark")
    p.add_argument("--json", metavar="FILE", type=Path, default=RESULTS)
    p.add_argument("--plot", metavar="FILE", type=Path, default=PLOT)
    return p


def main() -> None:
    options = parser().parse_args()
    engines = options.engines or list(bank_engines.ENGINES)
    missing = [name for name in engines if not installed(name)]
    for name in missing:
        note(f'{name} is not installed and left out: pip install -e ".[bench]"')
    results = json.loads(options.json.read_text()) if options.json.exists() else {"sizes": {}}
    for size in options.sizes:
        done = results["sizes"].setdefault(str(size), {"engines": {}})
        wanted = [name for name in engines if name not in missing]
        if not options.again:
            wanted = [name for name in wanted if name not in done["engines"]]
        if wanted:
            measure(size, wanted, options, done)
            results |= {"machine": machine(), "graph": bank_engines.GRAPH, "latents": latents()}
            results["sizes"] = dict(sorted(results["sizes"].items(), key=lambda item: int(item[0])))
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    plot(results, options.plot)


# ---- measuring


def measure(size: int, engines: list[str], options: argparse.Namespace, done: Any) -> None:
    """Measure engines at one size and put the medians into ``done``."""
    note(f"{size:,}: keys")
    place = bank_keys.cached(options.work, size, options.queries, SEED)
    keys, queries = np.load(place / "keys.npy", mmap_mode="r"), np.load(place / "queries.npy")
    exact = np.load(place / "scores.npy")
    done["real_keys"] = int(np.load(place / "real.npy"))
    if "bank index" in engines and not bank_engines.file_of("bank", place).exists():
        engines = ["bank", *(name for name in engines if name != "bank")]
    for name in engines:
        note(f"{size:,}: building {name}")
        done["engines"][name] = child("build", name, place, cores())
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for turn in range(ROUNDS):
        for name in engines:
            note(f"{size:,}: searching with {name}, round {turn + 1} of {ROUNDS}")
            rounds[name].append(child("search", name, place, 1))
    for name, passes in rounds.items():
        found = passes[0].pop("found")
        scores = [keys[rows].astype(np.float32) @ queries[q] for q, rows in enumerate(found)]
        right = [np.mean(score >= exact[q, -1] - 1e-5) for q, score in enumerate(scores)]
        first = [max(score) >= exact[q, 0] - 1e-5 for q, score in enumerate(scores)]
        numbers = {key: statistics.median(p[key] for p in passes) for key in passes[0]}
        numbers |= {"recall": float(np.mean(right)), "queries": len(found)}
        numbers["view_found"] = float(np.mean(first[1::2]))  # see bank_keys.Keys.queries
        done["engines"][name] |= {key: round(value, 4) for key, value in numbers.items()}
        done["engines"][name]["bytes_per_memory"] = round(done["engines"][name]["bytes"] / size, 1)
    if "bank" in engines:
        done["bank"] = child("changes", "bank", place, 1)


def child(task: str, engine: str, place: Path, threads: int) -> dict[str, Any]:
    """What `bank_engines.py` says, run in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    command = [sys.executable, bank_engines.__file__, task, engine, str(place), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{engine} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def latents() -> dict[str, float]:
    """Bytes of latents a memory of the default bank takes, as stored and as fp32."""
    with Bank.open(DEFAULT_WEIGHTS / "bank.sqlite", read_only=True) as bank:
        sizes = [memory.latents.shape for memory in bank.list()]
    int8 = [count * width + 2 * count for count, width in sizes]
    return {
        "memories": len(sizes),
        "int8_mean": statistics.fmean(int8),
        "int8_max": max(int8),
        "fp32_mean": statistics.fmean(4 * count * width for count, width in sizes),
        "fp32_max": max(4 * count * width for count, width in sizes),
    }


def installed(engine: str) -> bool:
    module = bank_engines.PEERS.get(engine)
    return module is None or importlib.util.find_spec(module) is not None


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for name in ("numpy", "hnswlib", "faiss-cpu", "usearch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    unset = [name for name in UNSET if name in os.environ]
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "python": platform.python_version(),
        **versions,
        **({"unset": unset} if unset else {}),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- what is shown


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each size and engine."""
    head = ["memories", "engine", "search ms (p95)", "recall@5", "view found", "build s"]
    head += ["open ms", "resident MiB", "bytes a memory"]
    rows = [head, ["---:", "---", *["---:"] * 7]]
    for size, done in results["sizes"].items():
        for name in bank_engines.ENGINES:
            if name not in done["engines"]:
                continue
            e = done["engines"][name]
            search = f"{e['search_ms']:.3g} ({e['search_p95_ms']:.3g})"
            cells = [f"{int(size):,}", name, search, f"{e['recall']:.3f}", f"{e['view_found']:.3f}"]
            cells += [f"{e['build_s']:.3g}", f"{e['open_ms']:.0f}", f"{e['resident_mib']:.0f}"]
            rows.append([*cells, f"{e['bytes_per_memory']:,.0f}"])
    lines = [f"| {' | '.join(cells)} |" for cells in rows] + [""]
    for size, done in results["sizes"].items():
        if "bank" in done:
            b, e = done["bank"], done["engines"]["bank"]
            lines.append(
                f"{int(size):,}: process start to first result {e['start_ms']:.0f} ms; adding one "
                f"memory {b['add_ms']:.2g} ms, the next search of who had the bank open "
                f"{b['search_after_add_ms']:.2g} ms; verify {b['verify_s']:.2g} s"
            )
    kept = results["latents"]
    lines.append(
        f"latents of the default bank: {kept['int8_mean']:.0f} bytes a memory (at most "
        f"{kept['int8_max']}), as fp32 {kept['fp32_mean']:.0f} (at most {kept['fp32_max']})"
    )
    lines.append(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    return "\n".join(lines)


PANELS = (
    ("search_ms", "one search, ms (median, one thread)", True),
    ("recall", "recall@5 (exact search: 1)", False),
    ("build_s", "building, s (all cores)", True),
    ("resident_mib", "resident memory, MiB", True),
)


def plot(results: dict[str, Any], file: Path) -> None:
    """Four panels over the number of memories."""
    if importlib.util.find_spec("matplotlib") is None:
        note('matplotlib is not installed, no plot: pip install -e ".[bench]"')
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True)
    for (key, title, logarithmic), axis in zip(PANELS, axes.flat, strict=True):
        for number, name in enumerate(bank_engines.ENGINES):
            points = [
                (int(size), done["engines"][name][key])
                for size, done in results["sizes"].items()
                if name in done["engines"]
            ]
            if points:
                style = "-" if name.startswith("bank") else "--"
                axis.plot(*zip(*points, strict=True), style, marker="o", ms=4, label=name,
                          color=f"C{number}")  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log")
        if logarithmic:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("memories")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
