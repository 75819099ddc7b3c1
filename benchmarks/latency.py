"""How long the default model takes, part by part, beside the same pipeline in torch.

    python benchmarks/latency.py [--torch] [--json FILE]
    python benchmarks/latency.py --profile [--json FILE]

Inside one process: load, encode, retrieve, prefill, decode, first token and tokens a second, after
warm-up, runtime and torch in turns. As whole processes: from start to the first letter of the
answer, and peak resident memory. Both pipelines get the same pictures, question, banks and threads
and decode greedily. A table on stdout, everything as JSON with --json.

"encode" is the time for a picture file to become image tokens, "retrieve" from there to memory
tokens, "prefill" until the first token is known. For torch, both connectors count as prefill.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tinyalign.runtime import TinyAlign
from tinyalign.runtime.paths import default_model_dir
from tinyalign.runtime.threads import default_threads

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"
TORCH_STARTS = 2  # each takes many seconds
STAGES = ("encode", "retrieve", "prefill", "first_token", "decode_per_token")
Sample = dict[str, float]  # what was measured once, in milliseconds (or MiB)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", metavar="DIR", type=Path, default=default_model_dir())
    p.add_argument("--torch", action="store_true", help="measure the torch pipeline beside it")
    p.add_argument("--weights", metavar="DIR", type=Path, help="the torch pipeline's weights")
    p.add_argument("--picture", metavar="FILE", nargs="+", help="default: all in examples/pictures")
    p.add_argument("--question", default="What is this?")
    p.add_argument("--max-tokens", metavar="N", type=int, default=32)
    p.add_argument("--warmup", metavar="N", type=int, default=2, help="rounds that do not count")
    p.add_argument("--repeat", metavar="N", type=int, default=5, help="rounds over all pictures")
    p.add_argument("--processes", metavar="N", type=int, default=5, help="starts of the command")
    p.add_argument("--threads", metavar="N", type=int, default=default_threads())
    p.add_argument(
        "--profile", action="store_true", help="instead: where the time of one question goes"
    )
    p.add_argument("--json", metavar="FILE", type=Path, help="write everything measured here")
    return p


def main() -> None:
    options = parser().parse_args()
    pictures = options.picture or sorted(
        str(path) for path in PICTURES.iterdir() if path.suffix in (".jpg", ".png", ".webp")
    )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if options.profile:
        from latency_profile import profile, report

        found = profile(options.model, options.threads, Path(pictures[0]), options.question)
        print(report(found))
        if options.json:
            options.json.write_text(
                json.dumps({"machine": machine(options.threads), **found}, indent=1) + "\n"
            )
        return
    # Processes first: a child's peak memory counts what this process held when it was started.
    starts = whole_processes(options, pictures[0])
    asks = {"runtime": runtime_pipeline(options)}
    if options.torch:
        asks["torch"] = torch_pipeline(options)
    samples = in_turns(
        {name: ask for name, (_, ask) in asks.items()}, pictures, options.warmup, options.repeat
    )
    result = {
        "machine": machine(options.threads),
        "question": options.question,
        "pictures": [Path(name).name for name in pictures],
        "load_ms": {name: load_ms for name, (load_ms, _) in asks.items()},
        "stages": {name: summarize(rows) for name, rows in samples.items()},
        "process": {name: summarize(rows) for name, rows in starts.items()},
    }
    note("")
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


# ---- the two pipelines: load time, and a function that answers once and says how long it took

Ask = Callable[[str], Sample]


def runtime_pipeline(options: argparse.Namespace) -> tuple[float, Ask]:
    note("loading the runtime")
    model = TinyAlign.load(options.model, options.threads)

    def ask(picture: str) -> Sample:
        model._seen.clear()  # else the second round would not look at the pictures
        answer = model.ask(picture, options.question, max_tokens=options.max_tokens)
        times = answer.timings
        tokens = answer.tokens - (answer.finish_reason == "length")  # after the first, with the end
        return {
            "encode": times.encode,
            "retrieve": times.retrieve,
            "prefill": times.prefill,
            "first_token": times.first_token,
            "decode_per_token": times.decode / max(1, tokens),
            "runs_per_token": answer.runs / max(1, tokens),
            "prompt_tokens": answer.prompt_tokens,
            "tokens": answer.tokens,
        }

    return model.load_ms, ask


def torch_pipeline(options: argparse.Namespace) -> tuple[float, Ask]:
    note("loading torch")
    import torch

    from tinyalign.bank import Bank
    from tinyalign.training import answer as steps
    from tinyalign.training.parts import DEFAULT_WEIGHTS, load_parts

    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    parts = load_parts(options.weights or DEFAULT_WEIGHTS)
    bank = Bank.open(options.model / "bank.sqlite", read_only=True)
    load_ms = 1e3 * (time.perf_counter() - started)

    def ask(picture: str) -> Sample:
        times = [time.perf_counter()]
        cells = steps.look(parts, picture)
        times.append(time.perf_counter())
        hits = steps.recall(parts, [bank], cells, options.question)
        times.append(time.perf_counter())
        rows = steps.prompt_rows(parts, cells, options.question, hits)
        steps.continue_greedily(parts, rows, hits, 1)
        times.append(time.perf_counter())
        ids = steps.continue_greedily(parts, rows, hits, options.max_tokens)
        whole = time.perf_counter() - times[3]  # prefill again, and all tokens
        encode, retrieve, prefill = (1e3 * (b - a) for a, b in itertools.pairwise(times))
        runs = len(ids) - (len(ids) == options.max_tokens)
        return {
            "encode": encode,
            "retrieve": retrieve,
            "prefill": prefill,
            "first_token": encode + retrieve + prefill,
            "decode_per_token": max(0.0, 1e3 * whole - prefill) / max(1, runs),
            "prompt_tokens": rows.shape[1],
            "tokens": len(ids),
        }

    return load_ms, ask


def in_turns(
    asks: dict[str, Ask], pictures: Sequence[str], warmup: int, repeat: int
) -> dict[str, list[Sample]]:
    """Every pipeline answers about every picture, in turns; the first rounds do not count."""
    samples: dict[str, list[Sample]] = {name: [] for name in asks}
    for done in range(warmup + repeat):
        for picture in pictures:
            for name, ask in asks.items():
                note(f"round {done + 1}/{warmup + repeat}: {Path(picture).name}, {name}")
                sample = ask(picture)
                if done >= warmup:
                    samples[name].append(sample)
    return samples


# ---- whole processes


def whole_processes(options: argparse.Namespace, picture: str) -> dict[str, list[Sample]]:
    """Start the command (and twice the torch pipeline) with nothing warm but the disk cache."""
    commands = {"runtime": runtime_command(options, picture)}
    if options.torch:
        commands["torch"] = torch_command(options, picture)
    starts: dict[str, list[Sample]] = {name: [] for name in commands}
    process(commands["runtime"])
    for i in range(options.processes):
        for name, command in commands.items():
            if name == "runtime" or i < TORCH_STARTS:
                note(f"process {i + 1}/{options.processes}: {name}")
                starts[name].append(process(command))
    return starts


def runtime_command(options: argparse.Namespace, picture: str) -> list[str]:
    command = Path(sys.executable).with_name("tinyalign-infer")
    model, threads = str(options.model), str(options.threads)
    limit = str(options.max_tokens)
    rest = ["--model", model, "--threads", threads, "--max-tokens", limit]
    return [str(command), picture, options.question, *rest]


def torch_command(options: argparse.Namespace, picture: str) -> list[str]:
    """A process that loads the torch pipeline and prints when it knows the first token."""
    code = """
import sys
from pathlib import Path
import torch
from tinyalign.bank import Bank
from tinyalign.training.answer import answer
from tinyalign.training.parts import DEFAULT_WEIGHTS, load_parts
picture, question, weights, bank, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
parts = load_parts(Path(weights) if weights else DEFAULT_WEIGHTS)
print(answer(parts, [Bank.open(bank, read_only=True)], picture, question, limit=1).text)
"""
    rest = [str(options.weights or ""), str(options.model / "bank.sqlite"), str(options.threads)]
    return [sys.executable, "-c", code, picture, options.question, *rest]


def process(command: list[str]) -> Sample:
    """Start a command; milliseconds until its first output, and peak resident memory in MiB."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        first = child.stdout.read(1)
        elapsed = 1e3 * (time.perf_counter() - started)
        child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode or not first:
            assert child.stderr is not None
            sys.exit(f"{command[0]} failed: {child.stderr.read().decode()}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"start_to_first_token": elapsed, "peak_rss_mib": usage.ru_maxrss * unit / (1 << 20)}


# ---- what is printed


def summarize(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation, median, least and number of every value."""
    summary = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        summary[name] = {
            "mean": statistics.fmean(values),
            "std": statistics.pstdev(values),
            "median": statistics.median(values),
            "min": min(values),
            "n": len(values),
        }
    return summary


def table(result: dict[str, Any]) -> str:
    """Markdown: one line a measurement, one column a pipeline, and their ratio."""
    names = list(result["stages"])
    head = ["", *(f"{name}: median" for name in names), *(f"{name}: mean ± std" for name in names)]
    both = len(names) == 2
    rows = [head + ["torch / runtime"] * both, ["---"] * (len(head) + both)]

    def row(label: str, stats: list[dict[str, float]], ratio: bool = True) -> None:
        cells = [label, *(f"{s['median']:.2f}" for s in stats)]
        cells += [f"{s['mean']:.2f} ± {s['std']:.2f}" for s in stats]
        quotient = f"{stats[-1]['median'] / max(stats[0]['median'], 1e-9):.1f}" if ratio else ""
        rows.append(cells + [quotient] * both)

    loads = [{"median": ms, "mean": ms, "std": 0.0} for ms in result["load_ms"].values()]
    row("load, ms", loads)
    for stage in STAGES:
        row(f"{stage.replace('_', ' ')}, ms", [result["stages"][name][stage] for name in names])
    for stage in ("prompt_tokens", "tokens"):
        row(stage.replace("_", " "), [result["stages"][name][stage] for name in names], ratio=False)
    for key, label in (
        ("start_to_first_token", "process start to first token, ms"),
        ("peak_rss_mib", "peak resident memory, MiB"),
    ):
        row(label, [result["process"][name][key] for name in names])
    runtime = result["stages"]["runtime"]
    share = runtime["retrieve"]["median"] / runtime["first_token"]["median"]
    speed = 1e3 / runtime["decode_per_token"]["median"]
    machine_line = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    return "\n".join(
        [f"| {' | '.join(cells)} |" for cells in rows]
        + [
            "",
            f"runtime: {speed:.0f} tokens/s; retrieval is {share:.1%} of the time to first token",
        ]
        + [machine_line]
    )


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("onnxruntime", "numpy", "pillow")},
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def note(text: str) -> None:
    """Progress on stderr, on one line where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
