"""What every precision of every component costs and gains: ``tinyalign-export --report``.

First all components are fp32: that model must answer as torch does. Then one component at a time
takes each of its other precisions, so that what is lost is known to be its doing; at last all have
those that were chosen. For each component the smallest precision that keeps within the limits is
recommended.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from tinyalign.export.model_dir import (
    BANK_NAME,
    write_component,
    write_components,
    write_manifest,
)
from tinyalign.export.precisions import CHOICES, FLOATS, Precisions, components_of
from tinyalign.export.quality import (
    FLOOR,
    AnswerReport,
    Check,
    Latency,
    TextQuality,
    TorchSide,
    ask_all,
    compare_answers,
    cosine,
    latency_of,
    text_quality,
    text_windows,
    torch_logits,
)
from tinyalign.export.report import PICTURES, difference, real_inputs, rounded, run, size_mb
from tinyalign.export.size import check_disk, component_bytes, model_bytes
from tinyalign.export.task import Task, accuracy
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.images import Picture
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.loading import Parts as RuntimeParts
from tinyalign.runtime.loading import open_session
from tinyalign.runtime.manifest import Precision
from tinyalign.training.parts import Parts

AGREEMENT, KL, COSINE = 0.97, 0.02, 0.999
"""Limits of what is recommended: least share of tokens that are torch's choice; greatest KL
divergence, for the language model; least cosine of outputs, for all others: a bank keeps what they
make, and so it must fit what another precision makes."""
REPORT_NAME, PLOT_NAME = "quantization.json", "quantization.png"
ANSWERING = ("vision", "connector", "rag_connector", "lm")  # the compressor only writes memories
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One model: a component in a precision and all others in fp32, or what was "chosen".

    `size_mb` and `load_ms` are the component's own (of "chosen", all components'). Of cosine and
    differences see `report.ComponentReport`; perplexity and KL are the language model's. None: not
    measured, since it cannot change or no set was given.
    """

    component: str
    precision: str
    size_mb: float
    load_ms: float
    cosine: float | None = None
    max_difference: float | None = None
    mean_difference: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    answers: AnswerReport | None = None
    latency: Latency | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """A component's smallest precision within the limits."""

    component: str
    precision: str
    reason: str


@dataclass(frozen=True)
class Trials:
    """All that was tried."""

    trials: tuple[Trial, ...]
    recommended: tuple[Recommendation, ...]
    torch_perplexity: float
    questions: int
    tasks: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "machine": machine(),
            "questions": self.questions,
            "tasks": self.tasks,
            "limits": {"agreement": AGREEMENT, "kl": KL, "cosine": COSINE, "floor": FLOOR},
            "torch_perplexity": round(self.torch_perplexity, 3),
            "trials": [trial_dict(trial) for trial in self.trials],
            "recommended": [asdict(item) for item in self.recommended],
        }

    def to_table(self) -> str:
        """As text."""
        lines = [
            f"{'component':14}{'weights':8}{'size':>9}{'cosine':>10}{'KL':>8}{'ppl':>7}{'same':>7}"
            f"{'equal':>9}{'right':>7}{'load':>9}{'encode':>9}{'prefill':>9}{'a token':>10}"
        ]
        lines += [table_line(trial) for trial in self.trials]
        lines += [
            f"torch's perplexity: {self.torch_perplexity:.2f}; same: share of tokens that torch "
            "chooses too; equal: whole answers",
            "",
            f"recommended: the smallest with same >= {AGREEMENT}, KL <= {KL}, cosine >= {COSINE}",
            *(f"{r.component:14}{r.precision:8}{r.reason}" for r in self.recommended),
        ]
        return "\n".join(lines)


# ---- trying


def report_bytes(parts: Parts, bank: Path) -> int:
    """About how many bytes the candidates take on the disk while they are compared."""
    largest = Precisions("fp16", "fp32", "fp32", "fp32", "fp32")  # one candidate at a time
    return component_bytes(parts, "lm", "fp32") + model_bytes(parts, largest, bank)


def try_all(
    side: TorchSide,
    chosen: Path,
    precisions: Precisions,
    checks: Sequence[Check],
    calibrating: Sequence[Picture],
    tasks: Sequence[Task],
    folder: Path,
    progress: Progress,
) -> Trials:
    """Compare all candidates; files are made in `folder` for as long as that takes.

    Args:
        side: the torch model, with what it chose so far.
        chosen: a whole model directory in `precisions`, used again where they are candidates.
        checks: what is asked to compare answers.
        calibrating: pictures to calibrate a vision encoder in int8 on.
        tasks: questions with known answers; none is measured without.
        folder: of the report; it is made if it is not there.

    Raises InputError when the candidates do not fit on the disk.
    """
    parts = side.parts
    check_disk(folder, report_bytes(parts, chosen / BANK_NAME))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".candidates-", dir=folder) as name:
        work = Path(name)
        progress("report: the model in fp32")
        (work / "fp32").mkdir()
        if parts.remembers:
            shutil.copyfile(chosen / BANK_NAME, work / "fp32" / BANK_NAME)
        write_components(parts, work / "fp32", FLOATS, calibrating, lambda _: None)
        write_manifest(parts, work / "fp32", FLOATS, {})
        progress("report: torch's probabilities on a text")
        windows = text_windows(parts)
        text = Text(windows, torch_logits(parts, windows))
        threads = torch.get_num_threads()
        with TinyAlign.load(work / "fp32", threads=threads) as base:
            bench = Bench(side, base, checks, tasks, text)
            progress("report: asking the model in fp32")
            floats = ask(bench, base)
            trials = [*try_each(bench, floats, chosen, precisions, calibrating, work, progress)]
            progress("report: the chosen precisions together")
            with TinyAlign.load(chosen, threads=threads) as model:
                trials.append(try_chosen(bench, model))
    return Trials(
        tuple(trials),
        tuple(recommend(name, trials) for name in CHOICES if name in components_of(parts)),
        text.perplexity(),
        len(checks),
        len(tasks),
    )


@dataclass(frozen=True)
class Text:
    """Windows of tokens and torch's logits [N, V] after each."""

    windows: Sequence[Sequence[int]]
    logits: Sequence[NDArray[np.float32]]

    def perplexity(self) -> float:
        """Torch's."""
        losses = [
            torch.nn.functional.cross_entropy(
                torch.from_numpy(rows[:-1]), torch.tensor(ids[1:]), reduction="none"
            )
            for ids, rows in zip(self.windows, self.logits, strict=True)
        ]
        return float(torch.cat(losses).mean().exp())


@dataclass(frozen=True)
class Bench:
    """What all candidates are measured with: both models in fp32, questions, tasks and a text."""

    side: TorchSide
    base: TinyAlign
    checks: Sequence[Check]
    tasks: Sequence[Task]
    text: Text


@dataclass(frozen=True)
class Asked:
    """What asking a model showed; the fields as in `Trial`."""

    answers: AnswerReport
    latency: Latency
    accuracy: float | None


def try_each(
    bench: Bench,
    floats: Asked,
    chosen: Path,
    precisions: Precisions,
    calibrating: Sequence[Picture],
    work: Path,
    progress: Progress,
) -> Sequence[Trial]:
    """A trial of every component in every precision; of int4 for the language model only if it was
    chosen, since calibrating it takes minutes. `floats`: of the model in fp32."""
    trials = []
    pictures = [check.picture for check in bench.checks[:PICTURES]]
    inputs = real_inputs(bench.side.parts, bench.base.banks, pictures)
    for name, choices in CHOICES.items():
        if name not in components_of(bench.side.parts):
            continue
        for precision in choices:
            if (name, precision) == ("lm", "int4") and precisions.lm != "int4":
                continue
            progress(f"report: {name} in {precision}")
            if precision == "fp32":
                path = work / "fp32" / f"{name}.onnx"
            elif precision == precisions.of(name):
                path = chosen / f"{name}.onnx"
            else:
                path = written(bench.side.parts, work, name, precision, calibrating)
            trial, model = (
                try_lm(bench, path, precision)
                if name == "lm"
                else try_component(bench, path, name, precision, inputs[name])
            )
            if name in ANSWERING:
                trial = with_asked(trial, floats if precision == "fp32" else ask(bench, model))
            trials.append(trial)
            if path.parent.parent == work and precision != "fp32":
                shutil.rmtree(path.parent)
    return trials


def written(
    parts: Parts, work: Path, name: str, precision: Precision, calibrating: Sequence[Picture]
) -> Path:
    """A component's graph, exported into a directory of its own beside the embeddings."""
    directory = work / f"{name}-{precision}"
    directory.mkdir()
    embeddings = work / "fp32" / "embeddings.bin"
    (directory / embeddings.name).hardlink_to(embeddings)
    write_component(parts, directory, name, precision, calibrating, lambda _: None)
    return directory / f"{name}.onnx"


def try_component(
    bench: Bench, path: Path, name: str, precision: str, inputs: tuple[torch.Tensor, ...]
) -> tuple[Trial, TinyAlign]:
    """One component but the language model, in a precision; and the model with it."""
    session, load_ms = timed_session(path)
    with torch.inference_mode():
        expected = getattr(bench.side.parts, name)(*inputs)
        expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    found = run(session, name, inputs)
    trial = Trial(
        name, precision, size_mb(path), load_ms, cosine(found, expected),
        *difference(found, expected),
    )  # fmt: skip
    if name not in ANSWERING:
        return trial, bench.base
    return trial, TinyAlign(with_session(bench.base.parts, name, session), bench.base.banks)


def with_session(parts: RuntimeParts, name: str, session: ort.InferenceSession) -> RuntimeParts:
    """An opened model directory with another graph of one component."""
    if name != "rag_connector":
        return dataclasses.replace(parts, **{name: session})
    assert parts.memory is not None
    return dataclasses.replace(
        parts, memory=dataclasses.replace(parts.memory, rag_connector=session)
    )


def try_lm(bench: Bench, path: Path, precision: str) -> tuple[Trial, TinyAlign]:
    """The language model in a precision; and the model with it."""
    session, load_ms = timed_session(path, spin=True)
    lm = LanguageModel(session, bench.base.parts.manifest.lm)
    trial = with_text(Trial("lm", precision, size_mb(path), load_ms), text_of(bench, lm))
    parts = dataclasses.replace(bench.base.parts, open_lm=lambda: lm)
    return trial, TinyAlign(parts, bench.base.banks)


def try_chosen(bench: Bench, model: TinyAlign) -> Trial:
    """A whole model directory."""
    directory = model.parts.directory
    size = sum(size_mb(directory / f"{name}.onnx") for name in CHOICES)
    trial = Trial("chosen", "", size, model.load_ms)
    return with_asked(with_text(trial, text_of(bench, model.parts.lm)), ask(bench, model))


def text_of(bench: Bench, lm: LanguageModel) -> TextQuality:
    """A language model on the text."""
    table = bench.base.parts.embeddings
    return text_quality(lm, table, bench.text.windows, bench.text.logits)


def with_text(trial: Trial, text: TextQuality) -> Trial:
    """A trial with what was measured on the text."""
    return dataclasses.replace(trial, **asdict(text))


def with_asked(trial: Trial, asked: Asked) -> Trial:
    """A trial with what asking showed."""
    return dataclasses.replace(
        trial, answers=asked.answers, latency=asked.latency, accuracy=asked.accuracy
    )


def ask(bench: Bench, model: TinyAlign) -> Asked:
    """Ask a model all questions and tasks."""
    model.ask(bench.checks[0].picture, "What?", max_tokens=2)  # the first run takes longer
    answers = ask_all(model, bench.checks)
    return Asked(
        compare_answers(bench.side, bench.checks, answers),
        latency_of(answers),
        accuracy(model, bench.tasks) if bench.tasks else None,
    )


def timed_session(path: Path, spin: bool = False) -> tuple[ort.InferenceSession, float]:
    """An open graph, and the milliseconds that opening it took."""
    start = time.perf_counter()
    session = open_session(path, torch.get_num_threads(), spin=spin)
    return session, 1e3 * (time.perf_counter() - start)


# ---- recommending


def recommend(component: str, trials: Sequence[Trial]) -> Recommendation:
    """The smallest precision of a component within the limits, and why no smaller one."""
    tried = sorted((t for t in trials if t.component == component), key=lambda t: t.size_mb)
    refused = []
    for trial in tried:
        if complaint := beyond_limits(trial):
            refused.append(f"{trial.precision} has {complaint}")
            continue
        whole = next(t.size_mb for t in tried if t.precision == "fp32")
        reason = f"{trial.size_mb:.1f} of {whole:.1f} MB"
        return Recommendation(component, trial.precision, "; ".join([reason, *refused]))
    return Recommendation(component, "fp32", "; ".join(["none is within the limits", *refused]))


def beyond_limits(trial: Trial) -> str:
    """Which limit a trial breaks, "" if none."""
    if trial.answers is not None and trial.answers.share < AGREEMENT:
        return f"same {trial.answers.share:.3f}"
    if trial.kl is not None and trial.kl > KL:
        return f"KL {trial.kl:.3f}"
    if trial.component != "lm" and trial.cosine is not None and trial.cosine < COSINE:
        return f"cosine {trial.cosine:.4f}"
    return ""


# ---- showing


def write_report(trials: Trials, folder: Path) -> list[Path]:
    """Write JSON and, where matplotlib is installed, a plot; the files."""
    files = [folder / REPORT_NAME]
    files[0].write_text(json.dumps(trials.to_dict(), indent=1) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        files.append(folder / PLOT_NAME)
        plot(trials.trials, files[1])
    return files


def machine() -> dict[str, Any]:
    """What the times and the text depend on."""
    return {
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),  # its documentation is the text
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
    }


def trial_dict(trial: Trial) -> dict[str, Any]:
    """As JSON values, with the share of same tokens and without what was not measured."""
    values = {k: v for k, v in rounded(asdict(trial)).items() if v is not None}
    if trial.answers is not None and trial.latency is not None:
        values["answers"] = trial.answers.to_dict()
        values["latency"] = rounded(asdict(trial.latency))
    return values


def table_line(trial: Trial) -> str:
    """One line of the table."""
    answers, latency = trial.answers, trial.latency
    cells = [
        f"{trial.component:14}{trial.precision:8}{trial.size_mb:6.1f} MB",
        cell(trial.cosine, 10, 5),
        cell(trial.kl, 8, 4),
        cell(trial.perplexity, 7, 2),
        cell(answers.share if answers else None, 7, 3),
        f"{answers.equal} of {answers.prompts}".rjust(9) if answers else " " * 9,
        cell(trial.accuracy, 7, 2),
        f"{trial.load_ms:6.0f} ms",
    ]
    if latency:
        cells.append(f"{latency.encode_ms:6.1f} ms{latency.prefill_ms:6.1f} ms")
        cells.append(f"{latency.token_ms:7.2f} ms")
    return "".join(cells).rstrip()


def cell(value: float | None, width: int, digits: int) -> str:
    """A number, or blanks."""
    return " " * width if value is None else f"{value:{width}.{digits}f}"


def plot(trials: Sequence[Trial], path: Path) -> None:
    """A row of bars for every trial, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {title: [bars(trial)[title] for trial in trials] for title in bars(trials[0])}
    names = [f"{t.component} {t.precision}".strip() for t in trials]
    colours = [f"C{[*CHOICES, 'chosen'].index(t.component)}" for t in trials]
    size = (2.6 * len(panels), 0.3 * len(trials) + 1.2)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True)
    for axis, (title, lengths) in zip(axes, panels.items(), strict=True):
        axis.barh(names, lengths, color=colours)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars(trial: Trial) -> dict[str, float]:
    """The lengths of a trial's bars by the titles of the panels; 0 for what was not measured."""
    answers, latency = trial.answers, trial.latency
    return {
        "size, MB": trial.size_mb,
        "tokens not as torch's, %": 100 * (1 - answers.share) if answers else 0.0,
        "1 - cosine": max(0.0, 1 - trial.cosine) if trial.cosine is not None else 0.0,
        "KL on a text, nats": trial.kl or 0.0,
        "encode + prefill, ms": latency.encode_ms + latency.prefill_ms if latency else 0.0,
        "a token, ms": latency.token_ms if latency else 0.0,
    }
