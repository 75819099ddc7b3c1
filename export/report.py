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
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tinyalign.bank import Bank, MemoryBank
from tinyalign.export.components import SIGNATURES
from tinyalign.export.model_dir import Precisions
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.images import Picture, load_for, preprocess
from tinyalign.runtime.loading import open_session
from tinyalign.runtime.manifest import ImageSpec
from tinyalign.runtime.memory_text import read_memory
from tinyalign.training.answer import (
    TorchAnswer,
    answer,
    choice,
    look,
    memory_texts,
    padded_latents,
    prompt_rows,
    recall,
    stop_ids,
)
from tinyalign.training.batch import text_input
from tinyalign.training.parts import Parts

QUESTIONS = (
    "What is this?",
    "What colour is it?",
    "How many things are there?",
    "Is this an animal?",
)
"""Asked in turn, one about each picture."""
LIMIT = 24  # longest answer that is compared, in tokens
REPEATS = 5  # timed runs, after one that is not
Array = NDArray[np.float32]


@dataclass(frozen=True)
class ComponentReport:
    """One line of the table; differences are those of the first output (the language model's: of
    the next token's probabilities), `size_mb` is the size of its files."""

    component: str
    precision: str
    size_mb: float
    max_difference: float
    mean_difference: float
    torch_ms: float
    onnx_ms: float


@dataclass(frozen=True)
class AnswerReport:
    """Greedy answers of the exported model beside torch's.

    `same_choice` of `tokens`: where torch, given the exported model's answer so far, would have
    chosen the same next token; the end of the answer counts as one.
    """

    prompts: int
    equal: int
    tokens: int
    same_choice: int


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    components: tuple[ComponentReport, ...]
    answers: AnswerReport

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, rounded to four digits."""
        rounded = [
            {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in asdict(c).items()}
            for c in self.components
        ]
        return {"components": rounded, "answers": asdict(self.answers)}

    def to_table(self) -> str:
        """As text."""
        names = f"{'component':16} {'weights':8} {'size':>9} {'max diff':>10} {'mean diff':>10}"
        lines = [f"{names} {'torch':>10} {'ONNX':>10}"]
        for c in self.components:
            lines.append(
                f"{c.component:16} {c.precision:8} {c.size_mb:6.1f} MB {c.max_difference:10.2g} "
                f"{c.mean_difference:10.2g} {c.torch_ms:7.1f} ms {c.onnx_ms:7.1f} ms"
            )
        a = self.answers
        lines.append(
            f"greedy answers equal to torch's: {a.equal} of {a.prompts}; "
            f"same choice of token: {a.same_choice} of {a.tokens}"
        )
        return "\n".join(lines)


def measure(
    parts: Parts,
    directory: Path,
    precisions: Precisions,
    pictures: Sequence[Picture],
    progress: Callable[[str], None],
) -> Report:
    """Compare a written model directory with torch on real pictures (at least one)."""
    with TinyAlign.load(directory, threads=torch.get_num_threads()) as model:
        progress("comparing components")
        lines = measure_components(parts, model, directory, precisions, pictures)
        lines += measure_lm(parts, model, directory, precisions, pictures[0])
        progress(f"comparing answers to {len(pictures)} questions")
        return Report(tuple(lines), measure_answers(parts, model, pictures))


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
        precision = getattr(precisions, name)
        files = sorted(directory.glob(f"{name}.onnx*"))
        lines.append(report_line(name, precision, files, found, expected, torch_ms, onnx_ms))
    return lines


def real_inputs(
    parts: Parts, banks: Sequence[MemoryBank], pictures: Sequence[Picture]
) -> dict[str, tuple[torch.Tensor, ...]]:
    """What real pictures and their nearest memories give each component."""
    spec, memory = ImageSpec(), parts.compressor.shape
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
    return {
        "vision": (torch.from_numpy(pixels),),
        "connector": (cells,),
        "compressor": (words, members, cells),
        "rag_connector": (latents,),
    }


def measure_lm(
    parts: Parts, model: TinyAlign, directory: Path, precisions: Precisions, picture: Picture
) -> list[ComponentReport]:
    """The language model, reading a prompt and then adding one token."""
    cells = look(parts, picture)
    hits = recall(parts, model.banks, cells, QUESTIONS[0])
    rows = prompt_rows(parts, cells, QUESTIONS[0], hits)  # [1, N, D]
    array, count, lm = rows[0].numpy(), rows.shape[1], model.parts.lm
    files = sorted(directory.glob("lm.onnx*"))
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
            cache.crop(count)
            parts.lm(inputs_embeds=rows[:, -1:], past_key_values=cache, use_cache=True)

        read_ms = median_ms(lambda: parts.lm(inputs_embeds=rows, logits_to_keep=1))
        add_ms = median_ms(torch_add)
    first, second = whole.logits[0].numpy()
    lines = []
    for name, expected, torch_ms, step in (
        (f"lm, reading {count}", first, read_ms, read),
        ("lm, a token", second, add_ms, add),
    ):
        found, wanted = softmax(step()[0]), softmax(expected)
        onnx_ms = median_ms(step)
        lines.append(report_line(name, precisions.lm, files, found, wanted, torch_ms, onnx_ms))
    return lines


def measure_answers(parts: Parts, model: TinyAlign, pictures: Sequence[Picture]) -> AnswerReport:
    """Greedy answers to one question about every picture, with the model's own bank."""
    equal = tokens = same = 0
    for picture, question in zip(pictures, cycle(QUESTIONS), strict=False):
        told = model.ask(picture, question, max_tokens=LIMIT)
        expected = answer(parts, model.banks, picture, question, LIMIT)
        equal += told.token_ids == expected.ids
        ended = told.finish_reason == "stop"
        tokens += len(told.token_ids) + ended
        same += count_same(parts, expected, told.token_ids, ended)
    return AnswerReport(len(pictures), equal, tokens, same)


@torch.inference_mode()
def count_same(parts: Parts, expected: TorchAnswer, ids: Sequence[int], ended: bool) -> int:
    """How many of `ids` (and the end) torch would have chosen after the prompt of `expected`."""
    told = parts.embeddings[list(ids)][None]  # [1, n, D]
    rows = torch.cat([expected.rows, told], 1)
    logits = parts.lm(inputs_embeds=rows, logits_to_keep=len(ids) + 1).logits[0]  # [n + 1, V]
    sentences = [s for text in memory_texts(parts, expected.hits) for s in text.to_copy()]
    choices = [choice(row, ids[:n], sentences, parts.prompt) for n, row in enumerate(logits)]
    same = sum(int(chosen == token) for chosen, token in zip(choices, ids, strict=False))
    return same + (1 if ended and choices[-1] in stop_ids(parts) else 0)


def check_pictures(bank: Path, most: int = 8) -> list[Picture]:
    """Two or more pictures to compare on: the examples of a source checkout, else the thumbnails of
    a bank (which need not be there), else only colours."""
    folder = Path(__file__).resolve().parents[1] / "examples" / "pictures"
    examples = [p for p in sorted(folder.glob("*")) if p.suffix in (".jpg", ".png", ".webp")]
    if examples:
        return [*examples[:most]]
    thumbnails: list[bytes] = []
    if bank.exists():
        with Bank.open(bank, read_only=True) as memories:
            thumbnails = [memory.thumbnail for memory in memories.list() if memory.thumbnail]
    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    return [*thumbnails[:most]] if len(thumbnails) > 1 else [ramp, ramp[::-1]]


def run(session: ort.InferenceSession, name: str, inputs: tuple[torch.Tensor, ...]) -> Array:
    """A component's first output."""
    signature = SIGNATURES[name]
    values = {key: v.numpy() for key, v in zip(signature.inputs, inputs, strict=True)}
    result: Array = session.run(signature.outputs, values)[0]
    return result


def report_line(
    name: str,
    precision: str,
    files: Sequence[Path],
    found: Array,
    expected: Array,
    torch_ms: float,
    onnx_ms: float,
) -> ComponentReport:
    """A line of the table from outputs and times."""
    difference = np.abs(found.astype(np.float64) - expected)
    size = sum(path.stat().st_size for path in files) / 1e6
    return ComponentReport(
        name, precision, size, float(difference.max()), float(difference.mean()), torch_ms, onnx_ms
    )


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
