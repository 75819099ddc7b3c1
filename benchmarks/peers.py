"""The same language model in other runtimes, side by side: speed at equal quality, and memory.

    python benchmarks/peers.py [--model DIR] [--peers NAME ...] [--rounds 7]

Every peer runs in a process of its own with the same threads and the same token ids, and is asked
in turns, so that a busy moment of the machine hits all alike; numbers are medians over rounds, and
ratios are medians of the rounds' own ratios. Quality stands beside speed: perplexity over 8 windows
of 512 tokens (English of Python's own library) against float32 in torch, and how many of 4 x 64
greedily decoded tokens are those of float32 before the first difference.

    prefill      reading 256 tokens
    decode       64 tokens after 128, one by one (answers of this runtime read two rows a run)
    start        process start to the first token after a prompt of 61 tokens. Of this runtime:
                 the whole program, with a picture and the memory bank
    memory       peak resident memory of a process that decodes. Of this runtime: the whole model

What decoding gains by drafts is measured on answers of the whole model: "answers" are the default
model's to questions on held-out things that were taught (`teach_lessons.py`), with their drafts,
beside the peers' decoding of as many tokens in the same round.

Peers that are not installed are left out and named. To install them:

    pip install llama-cpp-python                              (compiles llama.cpp)
    pip install --no-deps onnxruntime-genai==0.14.1           (reads the same graph)
    pip install -c constraints.txt -e ".[export]"             (torch, optimum)

Results: benchmarks/results/peers.json and docs/peers.png.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import blank, markdown, note, seen
from latency import machine
from lm_precision import MODULES, WINDOW
from teach_lessons import lessons_of

from tinyalign.runtime import TinyAlign
from tinyalign.runtime.paths import default_model_dir
from tinyalign.runtime.teach import create_bank
from tinyalign.runtime.threads import default_threads
from tinyalign.training.features import load_features
from tinyalign.training.sources import lm_gguf

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
WORK = ROOT / "build" / "peers"
PICTURE = ROOT / "examples" / "pictures" / "cat.jpg"
PEERS = {  # name -> module it needs
    "tinyalign": "onnxruntime",
    "llama.cpp Q4_1": "llama_cpp",
    "llama.cpp Q8_0": "llama_cpp",
    "llama.cpp Q4_0": "llama_cpp",
    "genai": "onnxruntime_genai",
    "optimum fp32": "optimum.onnxruntime",
    "optimum int8": "optimum.onnxruntime",
    "torch fp32": "torch",
    "torch bf16": "torch",
}
WINDOWS = 8
PREFILL, CONTEXT, COUNT, START = 256, 128, 64, 61
LESSONS = 12


class Worker:
    """A peer's process."""

    def __init__(self, name: str, model: Path, gguf: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("peers_worker.py"))]
        self._process = subprocess.Popen(
            [*command, name, str(model), str(gguf), str(WORK)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """One request and its answer; RuntimeError when the process has died."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Answers:
    """The whole model with taught memories, and questions on other views of the taught things."""

    def __init__(self, model: Path) -> None:
        cells, records = load_features()
        plain = TinyAlign.load(model)
        like = blank(plain)
        lessons = lessons_of(plain.parts.tokenizer, records, LESSONS)
        self._folder = tempfile.TemporaryDirectory()
        bank = Path(self._folder.name) / "taught.sqlite"
        with create_bank(plain, bank) as taught:
            for lesson in lessons:
                picture = replace(like, cells=cells[lesson.remembered].astype(np.float32))
                taught.add([replace(plain.memory(picture, lesson.text), content_hash="")])
        self._model = TinyAlign.load(model, banks=["default", bank])
        like = blank(self._model)
        self._asked = [
            (seen(self._model, like, cells[lesson.shown]), question.asked)
            for lesson in lessons
            for question in lesson.questions
        ]

    def decode(self, drafts: bool) -> dict[str, float]:
        """Seconds a token after the first, over all questions, and runs a token."""
        told = [self._model.ask(p, q, drafts=drafts, max_tokens=48) for p, q in self._asked]
        tokens = sum(len(answer.token_ids) for answer in told)  # the end in place of the first
        return {
            "seconds": sum(answer.timings.decode for answer in told) / 1e3 / tokens,
            "runs": sum(answer.runs for answer in told) / tokens,
            "tokens": tokens,
        }


def texts(tokenizer: Any) -> list[list[int]]:
    """Windows of token ids of English text."""
    text = "\n".join(importlib.import_module(name).__doc__ or "" for name in MODULES)
    text += "".join(
        Path(importlib.import_module(name).__file__ or "").read_text() for name in MODULES
    )
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]


def process_start(name: str, model: Path, gguf: Path, ids: Sequence[int]) -> float:
    """Seconds from starting a process to its first token."""
    started = time.perf_counter()
    if name == "tinyalign":
        command = [sys.executable, "-m", "tinyalign.runtime.cli", "--model", str(model)]
        asked = [*command, str(PICTURE), "What is this?", "--max-tokens", "1"]
        with subprocess.Popen(asked, stdout=subprocess.PIPE) as process:
            assert process.stdout
            if not process.stdout.read(1):
                raise RuntimeError("tinyalign-infer gave no answer")
            return time.perf_counter() - started
    worker = Worker(name, model, gguf)
    worker.ask("prefill", ids=list(ids))
    seconds = time.perf_counter() - started
    worker.close()
    return seconds


def whole_model_rss(model: Path) -> float:
    """Peak MiB of a process that answers a question about a picture."""
    code = (
        "import sys; sys.path.append(sys.argv[3]); from tinyalign.runtime import TinyAlign;"
        "TinyAlign.load(sys.argv[1]).ask(sys.argv[2], 'What is this?');"
        "from peers_worker import peak_mib; print(peak_mib())"
    )
    command = [sys.executable, "-c", code, str(model), str(PICTURE), str(Path(__file__).parent)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(names: Sequence[str], model: Path, rounds: int) -> dict[str, Any]:
    """All numbers of all peers."""
    gguf = lm_gguf()
    WORK.mkdir(parents=True, exist_ok=True)
    answers = Answers(model)
    windows = texts(answers._model.parts.tokenizer)
    found: dict[str, Any] = {}
    told: dict[str, list[list[int]]] = {}
    workers: dict[str, Worker] = {}
    for name in names:
        note(f"{name}: quality")
        worker = Worker(name, model, gguf)
        try:
            found[name] = {"version": worker.ask("load")["version"]}
        except (RuntimeError, BrokenPipeError) as error:
            note(f"{name} is left out: {error}")
            continue
        workers[name] = worker
        total = sum(worker.ask("nll", ids=ids)["nats"] for ids in windows)
        found[name]["perplexity"] = float(np.exp(total / (WINDOWS * (WINDOW - 1))))
        told[name] = [
            worker.ask("decode", ids=ids[:CONTEXT], count=COUNT)["ids"] for ids in windows[:4]
        ]
    series: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": [], "start": []} for name in workers
    }
    own: dict[str, list[float]] = {"drafts": [], "plain": []}
    for turn in range(rounds):
        note(f"round {turn + 1} of {rounds}")
        ids = windows[turn % WINDOWS]
        for name, worker in workers.items():
            seconds = worker.ask("prefill", ids=ids[:PREFILL])["seconds"]
            series[name]["prefill"].append(1e3 * seconds / PREFILL)
            seconds = worker.ask("decode", ids=ids[:CONTEXT], count=COUNT)["seconds"]
            series[name]["decode"].append(1e3 * seconds / COUNT)
        for key, drafts in (("drafts", True), ("plain", False)):
            result = answers.decode(drafts)
            own[key].append(1e3 * result["seconds"])
            found["tinyalign"][f"answers_{key}_runs"] = result["runs"]
    for name, worker in workers.items():
        worker.close()
        fresh = Worker(name, model, gguf)  # what quality was measured with takes more
        fresh.ask("decode", ids=windows[0][:CONTEXT], count=COUNT)
        found[name]["rss_mib"] = fresh.ask("rss")["mib"]
        fresh.close()
    found["tinyalign"]["lm_rss_mib"] = found["tinyalign"]["rss_mib"]
    found["tinyalign"]["rss_mib"] = whole_model_rss(model)
    for turn in range(min(rounds, 5)):
        note(f"starting, round {turn + 1}")
        for name in workers:
            series[name]["start"].append(process_start(name, model, gguf, windows[0][:START]))
    series["tinyalign"] |= {f"answers_{key}": values for key, values in own.items()}
    reference = told.get("torch fp32")
    for name in workers:
        found[name]["series"] = {k: [round(x, 5) for x in v] for k, v in series[name].items()}
        if reference:
            same = [
                next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
                for a, b in zip(told[name], reference, strict=True)
            ]
            found[name]["same_tokens"] = sum(same) / sum(map(len, reference))
    return found


def cpu_flags() -> list[str]:
    """What the processor has of the instructions that matter here."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
    file = Path("/proc/cpuinfo")
    have = set(file.read_text().split()) if file.exists() else set()
    return [flag for flag in wanted if flag in have]


def ratio(found: dict[str, Any], key: str, one: str, other: str, mine: str = "") -> float:
    """How many times as fast ``one`` is as ``other``: the median over rounds."""
    a, b = found[one]["series"][mine or key], found[other]["series"][key]
    return statistics.median(y / x for x, y in zip(a, b, strict=False))


def report(found: dict[str, Any]) -> str:
    """Tables of the numbers and of the ratios."""
    rows = [("", "perplexity", "tokens as fp32", "prefill 256, ms a token", "decode, ms a token",
             "start → first token, s", "peak MiB"), ("---",) * 7]  # fmt: skip
    for name, numbers in found.items():
        s = {key: statistics.median(values) for key, values in numbers["series"].items()}
        same = numbers.get("same_tokens")
        rows.append(
            (name, f"{numbers['perplexity']:.2f}", "" if same is None else f"{same:.2f}",
             f"{s['prefill']:.2f}", f"{s['decode']:.2f}", f"{s['start']:.2f}",
             f"{numbers['rss_mib']:.0f}")
        )  # fmt: skip
    lines = markdown(rows)
    own = found["tinyalign"]
    s = {key: statistics.median(values) for key, values in own["series"].items()}
    lines += [
        "",
        f"Answers from memories: {s['answers_drafts']:.2f} ms a token with drafts "
        f"({own['answers_drafts_runs']:.2f} runs a token), {s['answers_plain']:.2f} without.",
        "",
        *markdown([("tinyalign is faster by", "prefill", "decode", "answers from memories",
                    "start → first token"), ("---",) * 5]),
    ]  # fmt: skip
    for name in found:
        if name != "tinyalign":
            numbers = [
                ratio(found, "prefill", "tinyalign", name),
                ratio(found, "decode", "tinyalign", name),
                ratio(found, "decode", "tinyalign", name, "answers_drafts"),
                ratio(found, "start", "tinyalign", name),
            ]
            lines += markdown([(name, *(f"{value:.2f} ×" for value in numbers))])
    return "\n".join(lines)


def plot(found: dict[str, Any], file: Path) -> None:
    """Bars of milliseconds a token, and of perplexity."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(found)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for panel, key, title in (
        (axes[0], "prefill", "reading 256 tokens, ms a token"),
        (axes[1], "decode", "writing, ms a token"),
    ):
        labels = [*names]
        values = [statistics.median(found[name]["series"][key]) for name in names]
        if key == "decode":
            labels.insert(1, "tinyalign, answers\nfrom memories")
            values.insert(1, statistics.median(found["tinyalign"]["series"]["answers_drafts"]))
        colours = ["C1" if label.startswith("tinyalign") else "C0" for label in labels]
        bars = panel.barh(labels, values, color=colours)
        panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=10)
    values = [found[name]["perplexity"] for name in names]
    bars = axes[2].barh(names, values, color=["C1" if n == "tinyalign" else "C0" for n in names])
    axes[2].bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes[2].invert_yaxis()
    axes[2].set_xlim(left=min(values) * 0.9)
    axes[2].set_title("perplexity (lower is better)", fontsize=10)
    for panel in axes:
        panel.tick_params(labelsize=8)
        panel.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, write the results, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", type=Path, default=default_model_dir())
    parser.add_argument("--peers", metavar="NAME", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", metavar="N", type=int, default=7)
    parser.add_argument("--report", action="store_true", help="only print what was measured")
    options = parser.parse_args()
    if not options.report:
        names = list(dict.fromkeys(["tinyalign", *options.peers]))
        for name in [name for name in names if not installed(PEERS[name])]:
            note(f"{name} is left out: {PEERS[name]} is not installed")
            names.remove(name)
        results = {
            "machine": machine(default_threads()) | {"flags": cpu_flags()},
            "peers": measure(names, options.model, options.rounds),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    found = json.loads(RESULTS.read_text())["peers"]
    print(report(found))
    plot(found, ROOT / "docs" / "peers.png")


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
