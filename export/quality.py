"""Whether an exported model still answers as torch does, and what its probabilities lost.

The exported model answers many short questions greedily. Then torch reads the same prompt, made by
its own encoder, connectors and retrieval, and the answer that was given: in one run it says which
token it would have chosen at each place. Where all are the same, its own greedy answer is that one.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyalign.bank import Bank, Hit, MemoryBank
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.answers import Answer
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.images import Picture
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.manifest import MemoryMode
from tinyalign.runtime.prompt import encode_text
from tinyalign.training.answer import (
    choice,
    look,
    memory_texts,
    prompt_rows,
    recall,
    stop_ids,
    unknown_id,
)
from tinyalign.training.parts import Parts

FLOOR = 0.96
"""The least share of tokens that must be the same as torch's. Measured (docs/export.md): 0.98 with
the default precisions, 0.93 with the language model in int4."""
QUESTIONS = (
    "What is this?",
    "What colour is it?",
    "How many things are there?",
    "Is this an animal?",
    "Tell me about this.",
)
"""Asked in turn, one about each picture."""
WAYS: tuple[tuple[MemoryMode | None, bool], ...] = ((None, True), ("latent", True), (None, False))
"""How memories are read, in turn: as the model does by default, through the RAG connector, and not
at all, as where nothing alike was taught (what is copied from a memory hardly ever changes)."""
CHECKED, CALIBRATING = 48, 64  # questions, and pictures to calibrate a vision encoder on
EACH = 3  # questions about each example picture where a bank has no others
LIMIT = 24  # longest answer that is compared, in tokens
MODULES = ("heapq", "doctest", "argparse", "decimal", "statistics", "pdb", "optparse", "threading")
"""Modules of Python's library whose English descriptions are the text for perplexity."""
WINDOW, WINDOWS = 256, 4  # tokens read at once, and how often
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Check:
    """One question about one picture; `mode` and `memory` as in `TinyAlign.ask`."""

    picture: Picture
    question: str
    mode: MemoryMode | None = None
    memory: bool = True


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

    @property
    def share(self) -> float:
        """Of the tokens, how many are the same choice."""
        return self.same_choice / max(1, self.tokens)

    @property
    def below_floor(self) -> bool:
        """Whether that are too few."""
        return self.share < FLOOR

    def to_dict(self) -> dict[str, float]:
        """As JSON values, with the share."""
        return asdict(self) | {"share": round(self.share, 4)}


@dataclass(frozen=True)
class Latency:
    """Medians over answers, in milliseconds: of picture to image tokens, of reading the prompt, and
    of each token after the first."""

    encode_ms: float
    prefill_ms: float
    token_ms: float


@dataclass(frozen=True)
class TextQuality:
    """Of next-token probabilities on a text: perplexity, and the mean KL divergence from torch's in
    nats; then the cosine of logits, and the differences of probabilities."""

    perplexity: float
    kl: float
    cosine: float
    max_difference: float
    mean_difference: float


# ---- what is asked


def check_questions(bank: Path, most: int = CHECKED) -> list[Check]:
    """Questions about the example pictures of a source checkout and thumbnails of a bank (which
    need not be there), spread over it; about two colour ramps where there are neither."""
    shown = [*example_pictures(), *thumbnails(bank, most, 0.5)][:most]
    pictures = shown if len(shown) > 1 else colour_ramps()
    asked = zip(cycle(pictures), cycle(QUESTIONS), cycle(WAYS), strict=False)
    count = min(most, max(len(pictures), EACH * len(example_pictures())))
    return [Check(picture, question, *way) for picture, question, way in islice(asked, count)]


def calibration_pictures(bank: Path) -> list[Picture]:
    """Two or more pictures to calibrate on, others than those asked about where the bank has so
    many: thumbnails of a bank, else what there is."""
    found = thumbnails(bank, CALIBRATING, 0.0)
    return found if len(found) > 1 else (example_pictures() or colour_ramps())


def example_pictures() -> list[Picture]:
    """The pictures of a source checkout, none when installed without."""
    folder = Path(__file__).resolve().parents[1] / "examples" / "pictures"
    return [p for p in sorted(folder.glob("*")) if p.suffix in (".jpg", ".png", ".webp")]


def thumbnails(bank: Path, most: int, offset: float) -> list[Picture]:
    """At most so many thumbnails of a bank, evenly spread, each `offset` of a step further on."""
    if not bank.exists():
        return []
    with Bank.open(bank, read_only=True) as memories:
        found = [memory.thumbnail for memory in memories.list() if memory.thumbnail]
    count = min(most, len(found))
    return [found[int((i + offset) * len(found) / count)] for i in range(count)]


def colour_ramps() -> list[Picture]:
    """Two pictures of nothing."""
    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    return [ramp, ramp[::-1]]


# ---- answers


@dataclass
class TorchSide:
    """The torch model with what it made of the questions so far, as many models are compared."""

    parts: Parts
    banks: Sequence[MemoryBank]
    prompts: dict[Check, tuple[Tensor, tuple[Hit, ...]]] = field(default_factory=dict)
    chosen: dict[tuple[Check, tuple[int, ...]], list[int]] = field(default_factory=dict)

    def choices(self, check: Check, ids: tuple[int, ...]) -> list[int]:
        """What torch chooses after the prompt and after each of the tokens of an answer."""
        known = self.chosen.get((check, ids))
        if known is None:
            known = self.chosen[check, ids] = self._choose(check, ids)
        return known

    @torch.inference_mode()
    def _choose(self, check: Check, ids: tuple[int, ...]) -> list[int]:
        parts, prompt = self.parts, self.parts.prompt
        rows, hits = self._prompt(check)
        told = parts.embeddings[list(ids)][None]  # [1, n, D]
        output = parts.lm(inputs_embeds=torch.cat([rows, told], 1), logits_to_keep=len(ids) + 1)
        logits = output.logits[0, -len(ids) - 1 :]  # [n + 1, V]
        margin = prompt.unknown_margin
        if hits and margin and (check.mode or prompt.memory_mode) != "latent":
            logits[0, unknown_id(parts)] -= margin
        sentences = [s for text in memory_texts(parts, hits) for s in text.to_copy()]
        return [choice(row, ids[:n], sentences, prompt) for n, row in enumerate(logits)]

    def _prompt(self, check: Check) -> tuple[Tensor, tuple[Hit, ...]]:
        """Rows [1, N, D] and the memories they rest on."""
        if check not in self.prompts:
            cells = look(self.parts, check.picture)
            banks = self.banks if check.memory else ()
            hits = recall(self.parts, banks, cells, check.question)
            rows = prompt_rows(self.parts, cells, check.question, hits, check.mode)
            self.prompts[check] = rows, tuple(hits)
        return self.prompts[check]


def ask_all(model: TinyAlign, checks: Sequence[Check]) -> list[Answer]:
    """The exported model's greedy answers."""
    return [
        model.ask(
            check.picture,
            check.question,
            memory=check.memory,
            memory_mode=check.mode,
            max_tokens=LIMIT,
        )
        for check in checks
    ]


def compare_answers(
    side: TorchSide, checks: Sequence[Check], answers: Sequence[Answer]
) -> AnswerReport:
    """The answers beside what torch chooses."""
    stops = stop_ids(side.parts)
    equal = tokens = same = 0
    for check, told in zip(checks, answers, strict=True):
        choices = side.choices(check, told.token_ids)
        agreed = [a == b for a, b in zip(choices, told.token_ids, strict=False)]
        if told.finish_reason == "stop":
            agreed.append(choices[-1] in stops)
        equal += all(agreed)
        tokens += len(agreed)
        same += sum(agreed)
    return AnswerReport(len(checks), equal, tokens, same)


def check_floor(answers: AnswerReport, accepted: bool) -> None:
    """Raises InputError when too few tokens are the same as torch's and that is not accepted."""
    if answers.below_floor and not accepted:
        raise InputError(
            f"{loss(answers)}: nothing was written (--accept-quality-loss writes it all the same)"
        )


def loss(answers: AnswerReport) -> str:
    """What is said of a model below the floor."""
    return (
        f"only {answers.share:.3f} of the answers' tokens are the same as torch's "
        f"({answers.same_choice} of {answers.tokens}), less than {FLOOR}"
    )


def latency_of(answers: Sequence[Answer]) -> Latency:
    """Medians over answers that the same model gave one after another."""
    steps = [told.timings.decode / (told.tokens - 1) for told in answers if told.tokens > 1]
    return Latency(
        statistics.median(told.timings.encode for told in answers),
        statistics.median(told.timings.prefill for told in answers),
        statistics.median(steps) if steps else 0.0,
    )


# ---- text


def text_windows(parts: Parts) -> list[list[int]]:
    """Tokens of English text in windows that are read one by one."""
    text = "\n".join(importlib.import_module(name).__doc__ or "" for name in MODULES)
    ids = encode_text(parts.tokenizer, text)[: WINDOW * WINDOWS]
    return [list(ids[i : i + WINDOW]) for i in range(0, len(ids), WINDOW)]


@torch.inference_mode()
def torch_logits(parts: Parts, windows: Sequence[Sequence[int]]) -> list[Floats]:
    """Logits [N, V] of torch's language model after every token of each window."""
    table = parts.embeddings
    return [parts.lm(inputs_embeds=table[list(ids)][None]).logits[0].numpy() for ids in windows]


def text_quality(
    lm: LanguageModel,
    embeddings: NDArray[np.float16],
    windows: Sequence[Sequence[int]],
    reference: Sequence[Floats],
) -> TextQuality:
    """An exported language model beside torch's `reference` logits on the same windows."""
    losses, divergences, cosines, largest, means = [], [], [], [], []
    for ids, expected in zip(windows, reference, strict=True):
        rows = embeddings[list(ids)].astype(np.float32)  # [N, D]
        found = lm.forward(lm.new_state(len(ids)), rows, tuple(range(len(ids))))  # [N, V]
        ours, theirs = log_softmax(found), log_softmax(expected)
        losses.append(-ours[np.arange(len(ids) - 1), list(ids[1:])])
        wanted = np.exp(theirs)
        divergences.append((wanted * (theirs - ours)).sum(axis=-1))
        cosines.append(cosine(found, expected))
        difference = np.abs(np.exp(ours) - wanted)
        largest.append(float(difference.max()))
        means.append(float(difference.mean()))
    return TextQuality(
        perplexity=float(np.exp(np.concatenate(losses).mean())),
        kl=float(np.concatenate(divergences).mean()),
        cosine=statistics.mean(cosines),
        max_difference=max(largest),
        mean_difference=statistics.mean(means),
    )


def log_softmax(logits: Floats) -> Floats:
    """Log probabilities [.., V] of logits [.., V]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def cosine(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    """Mean cosine of the rows [.., K] of two arrays; rows that are zero in both count as equal."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (found, expected))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    alike = (a * b).sum(axis=1) / np.where(lengths == 0, 1, lengths)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    return float(np.where(both_zero, 1.0, alike).mean())
