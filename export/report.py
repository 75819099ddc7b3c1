"""What an export lost and gained: each component and whole answers, against torch.

Every component gets the inputs that real pictures and memories give it. The language model is
looked at twice, as it reads a whole prompt and as it adds one token to it, and its probabilities
are compared: quantized weights move all logits by nearly the same amount, which changes nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tinyalign.bank import MemoryBank
from tinyalign.export.components import SIGNATURES
from tinyalign.export.precisions import Precisions, components_of
from tinyalign.export.quality import (
    QUESTIONS,
    AnswerReport,
    Check,
    TorchSide,
    ask_all,
    compare_answers,
    cosine,
)
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.images import Picture, load_for, preprocess
from tinyalign.runtime.loading import open_session
from tinyalign.runtime.memory_text import read_memory
from tinyalign.training.answer import look, padded_latents, prompt_rows, recall
from tinyalign.training.batch import text_input
from tinyalign.training.parts import Parts

PICTURES = 8  # that components are compared on
REPEATS = 5  # timed runs, after one that is not
Array = NDArray[np.float32]


@dataclass(frozen=True)
class ComponentReport:
    """One line of the table.

    `cosine` (mean over rows) and differences are of the first output; the language model's of the
    next token's logits, and of its probabilities. `size_mb` is the size of its files.
    """

    component: str
    precision: str
    size_mb: float
    cosine: float
    max_difference: float
    mean_difference: float
    torch_ms: float
    onnx_ms: float


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    components: tuple[ComponentReport, ...]
    answers: AnswerReport

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, rounded to four digits."""
        components = [rounded(asdict(component)) for component in self.components]
        return {"components": components, "answers": self.answers.to_dict()}

    def to_table(self) -> str:
        """As text."""
        names = f"{'component':16} {'weights':7} {'size':>9} {'cosine':>8} {'max diff':>9}"
        lines = [f"{names} {'mean diff':>10} {'torch':>10} {'ONNX':>10}"]
        for c in self.components:
            lines.append(
                f"{c.component:16} {c.precision:7} {c.size_mb:6.1f} MB {c.cosine:8.5f} "
                f"{c.max_difference:9.2g} {c.mean_difference:10.2g} {c.torch_ms:7.1f} ms "
                f"{c.onnx_ms:7.1f} ms"
            )
        a = self.answers
        lines.append(
            f"greedy answers equal to torch's: {a.equal} of {a.prompts}; "
            f"same choice of token: {a.same_choice} of {a.tokens}"
        )
        return "\n".join(lines)


def measure(
    side: TorchSide,
    directory: Path,
    precisions: Precisions,
    checks: Sequence[Check],
    progress: Callable[[str], None],
) -> Report:
    """Compare a written model directory with torch on questions about pictures (one or more)."""
    parts = side.parts
    pictures = [check.picture for check in checks[:PICTURES]]
    with TinyAlign.load(directory, threads=torch.get_num_threads()) as model:
        progress("comparing components")
        lines = measure_components(parts, model, directory, precisions, pictures)
        lines += measure_lm(parts, model, directory, precisions, pictures[0])
        progress(f"comparing answers to {len(checks)} questions")
        answers = compare_answers(side, checks, ask_all(model, checks))
        return Report(tuple(lines), answers)


def measure_components(
    parts: Parts,
    model: TinyAlign,
    directory: Path,
    precisions: Precisions,
    pictures: Sequence[Picture],
) -> list[ComponentReport]:
    """All components but the language model."""
    lines = []
    for name, inputs in real_inputs(parts, model.banks, pictures).items():
        path = directory / f"{name}.onnx"
        session = open_session(path, torch.get_num_threads())
        module = getattr(parts, name)
        with torch.inference_mode():
            expected = module(*inputs)
            expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
            one = tuple(value[:1] for value in inputs)
            torch_ms = median_ms(partial(module, *one))
        found = run(session, name, inputs)
        onnx_ms = median_ms(partial(run, session, name, one))
        size, precision = size_mb(path), precisions.of(name)
        alike, differences = cosine(found, expected), difference(found, expected)
        lines.append(ComponentReport(name, precision, size, alike, *differences, torch_ms, onnx_ms))
    return lines


def real_inputs(
    parts: Parts, banks: Sequence[MemoryBank], pictures: Sequence[Picture]
) -> dict[str, tuple[torch.Tensor, ...]]:
    """What real pictures and their nearest memories give each component."""
    spec, memory = parts.image, parts.compressor.shape
    pixels = np.stack([preprocess(load_for(p, spec), spec) for p in pictures])
    with torch.inference_mode():
        cells = parts.vision(torch.from_numpy(pixels))
        read = [  # texts of several lengths
            read_memory(parts.tokenizer, "This is it. " * n, memory.max_text_tokens, memory.chunks)
            for n in range(1, len(pictures) + 1)
        ]
        ids, members = text_input(read, memory, memory.max_text_tokens)
        words = functional.embedding(ids, parts.embeddings)
        hits = recall(parts, banks, cells, QUESTIONS[0])
        latents = padded_latents(parts, hits) if hits else parts.compressor(words, members, cells)
    found = {
        "vision": (torch.from_numpy(pixels),),
        "connector": (cells,),
        "compressor": (words, members, cells),
        "rag_connector": (latents,),
    }
    return {name: inputs for name, inputs in found.items() if name in components_of(parts)}


def measure_lm(
    parts: Parts, model: TinyAlign, directory: Path, precisions: Precisions, picture: Picture
) -> list[ComponentReport]:
    """The language model, reading a prompt and then adding one token."""
    cells = look(parts, picture)
    hits = recall(parts, model.banks, cells, QUESTIONS[0])
    rows = prompt_rows(parts, cells, QUESTIONS[0], hits)  # [1, N, D]
    array, count, lm = rows[0].numpy(), rows.shape[1], model.parts.lm
    size = size_mb(directory / "lm.onnx")
    state = lm.new_state(count + 1)

    def read() -> Array:
        state.length = 0
        return lm.forward(state, array)

    def add() -> Array:
        state.length = count
        return lm.forward(state, array[-1:])

    with torch.inference_mode():
        # one token more than the prompt, so that both lines have something to compare with
        whole = parts.lm(inputs_embeds=torch.cat([rows, rows[:, -1:]], 1), logits_to_keep=2)
        cache = parts.lm(inputs_embeds=rows, use_cache=True, logits_to_keep=1).past_key_values

        def torch_add() -> None:
            parts.lm(inputs_embeds=rows[:, -1:], past_key_values=cache, use_cache=True)

        read_ms = median_ms(lambda: parts.lm(inputs_embeds=rows, logits_to_keep=1))
        add_ms = median_ms(torch_add)
    first, second = whole.logits[0, -2:].numpy()  # OPT gives all of them
    lines = []
    for name, expected, torch_ms, step in (
        (f"lm, reading {count}", first, read_ms, read),
        ("lm, a token", second, add_ms, add),
    ):
        found = step()[0].copy()
        alike, differences = cosine(found, expected), difference(softmax(found), softmax(expected))
        lines.append(
            ComponentReport(
                name, precisions.lm, size, alike, *differences, torch_ms, median_ms(step)
            )
        )
    return lines


def run(session: ort.InferenceSession, name: str, inputs: tuple[torch.Tensor, ...]) -> Array:
    """A component's first output."""
    signature = SIGNATURES[name]
    values = {key: v.numpy() for key, v in zip(signature.inputs, inputs, strict=True)}
    result: Array = session.run(signature.outputs[:1], values)[0]
    return result


def size_mb(path: Path) -> float:
    """Of a graph and the weights beside it, in MB."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6


def difference(found: Array, expected: Array) -> tuple[float, float]:
    """The greatest and the mean absolute difference."""
    apart = np.abs(found.astype(np.float64) - expected)
    return float(apart.max()), float(apart.mean())


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a table, rounded to four digits (a cosine to seven)."""
    return {
        key: float(f"{v:.{7 if key == 'cosine' else 4}g}") if isinstance(v, float) else v
        for key, v in values.items()
    }


def softmax(logits: Array) -> Array:
    """Probabilities [V] of logits [V]."""
    weights: Array = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights


def median_ms(work: Callable[[], object]) -> float:
    """Median milliseconds of some runs after a first one."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
