"""Questions on held-out pictures, answered in batches by the torch model as training has it.

The answers are those of greedy decoding with the bonus for copying, as in the runtime; a batch on a
GPU takes a second, so that many recipes can be compared. What is shipped is measured through the
runtime instead (`teach.py`, `accuracy.py`).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import interval, is_right, look_questions
from teach_lessons import is_right_answer, lessons_of

from tinyalign.runtime.manifest import MemoryMode
from tinyalign.runtime.memory_text import read_memory
from tinyalign.training.answer import choice, stop_ids, unknown_id
from tinyalign.training.batch import Episode, RetrievedMemory, Turn
from tinyalign.training.episodes import Found, misleading, neighbours, show
from tinyalign.training.lm import token_table
from tinyalign.training.questions import Item, sentence
from tinyalign.training.stages import Run, base_of, embed_episodes, lm_arithmetic
from tinyalign.training.styles import EMOJI_STYLES
from tinyalign.training.world import World

SEED = 5
BATCH = 64
MAX_TOKENS = 24
MODES: tuple[MemoryMode, ...] = ("text", "latent", "both")


@dataclass(frozen=True)
class Asked:
    """A question with what was retrieved, its group, and how its answer is judged."""

    group: str
    row: int
    question: str
    memories: tuple[RetrievedMemory, ...]
    judge: Any  # answer -> bool

    def episode(self, mode: MemoryMode) -> Episode:
        """What the model is shown, without the answer."""
        return Episode(self.row, self.memories, (Turn(self.question, ""),), mode)


def measure(run: Run, things: int = 100, each: int = 40) -> dict[str, Any]:
    """Shares of right answers: what was taught (in every memory mode) and looks (retrieved
    memories as text, unrelated ones, none)."""
    run.parts.connector.eval()
    run.lm.eval()
    result: dict[str, Any] = {}
    taught = taught_questions(run.world, things)
    for mode in MODES:
        result[f"taught, {mode}"] = shares(run, taught, mode)
    for memories in ("retrieved", "unrelated", "none"):
        asked = looks(run, each, memories)
        result[f"looks, {memories}"] = shares(run, asked, "text")
    return result


def shares(run: Run, asked: Sequence[Asked], mode: MemoryMode) -> dict[str, dict[str, float]]:
    """The share of right answers of every group."""
    texts = answers(run, [question.episode(mode) for question in asked])
    groups: dict[str, list[bool]] = defaultdict(list)
    for question, text in zip(asked, texts, strict=True):
        groups[question.group].append(question.judge(text))
    return {group: interval(right) for group, right in sorted(groups.items())}


def taught_questions(world: World, things: int) -> list[Asked]:
    """The lessons of `teach.py`, all in the bank together with the default memories."""
    lessons = lessons_of(world.parts.tokenizer, world.records, things)
    texts = [*world.bank_texts, *(lesson.text for lesson in lessons)]
    rows = [*world.bank.tolist(), *(lesson.remembered for lesson in lessons)]
    taught = np.stack([world.key(lesson.remembered, lesson.text) for lesson in lessons])
    keys = np.concatenate([world.bank_keys, taught])
    asked = []
    for lesson in lessons:
        for question in lesson.questions:
            scores = keys @ world.key(lesson.shown, question.asked)
            best = np.argsort(-scores)[: world.parts.prompt.top_k]
            found = [Found(float(scores[i]), texts[i], rows[i]) for i in best]

            def judge(answer: str, lesson: Any = lesson, question: Any = question) -> bool:
                return is_right_answer(lesson, question, answer)

            asked.append(
                Asked(question.kind, lesson.shown, question.asked, show(world, found), judge)
            )
    return asked


def looks(run: Run, each: int, memories: str) -> list[Asked]:
    """Held-out scenes and shapes; names of pictures by other makers, whose concepts the bank holds
    (with the key head trained on them)."""
    world = run.world
    questions = look_questions(world.records, each, Random(SEED))
    rows = [
        row for row, record in enumerate(world.records)
        if record.source in EMOJI_STYLES and record.split == "train" and record.view == 0
    ]  # fmt: skip
    questions["other makers name"] = [
        (row, Item("What is this?", sentence(name := world.records[row].name), name, "name"))
        for row in Random(SEED).sample(rows, 4 * each)
    ]
    asked = []
    for group, items in questions.items():
        for row, item in items:
            shown: tuple[RetrievedMemory, ...] = ()
            if memories == "retrieved":
                shown = neighbours(world, row, item.question, run.recipe)
            elif memories == "unrelated":
                shown = misleading(world, row, run.recipe, Random(row))

            def judge(answer: str, item: Item = item) -> bool:
                return is_right(item, answer)

            asked.append(Asked(group, row, item.question, shown, judge))
    return asked


@torch.inference_mode()
def answers(run: Run, episodes: Sequence[Episode]) -> list[str]:
    """The greedy answer to the one question of every episode."""

    def length(place: int) -> int:
        return sum(len(memory.text) for memory in episodes[place].memories)

    order = sorted(range(len(episodes)), key=length)
    texts = [""] * len(episodes)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        for place, text in zip(part, batch_answers(run, [episodes[i] for i in part]), strict=True):
            texts[place] = text
    return texts


def batch_answers(run: Run, episodes: Sequence[Episode]) -> list[str]:
    """The same for one batch."""
    parts, device, shape = run.parts, run.device, run.parts.compressor.shape
    bonus = tuple(parts.rag_connector.copy_bonus.tolist())
    prompt = dataclasses.replace(parts.prompt, copy_bonus=bonus)
    batch, rows = embed_episodes(run, episodes)  # what stands behind a prompt is not looked at
    asked = (batch.labels >= 0).int().argmax(1) + 1  # [B], tokens of every prompt
    count, width = batch.ids.shape
    seen = torch.arange(width, device=device) < asked[:, None]  # [B, N]
    sentences = [
        [
            sentence
            for memory in episode.memories
            for sentence in read_memory(
                parts.tokenizer, memory.text, shape.max_text_tokens, shape.chunks
            ).to_copy()
        ]
        for episode in episodes
    ]
    lm, table, stop = base_of(run.lm), token_table(base_of(run.lm)), stop_ids(parts)
    ids: list[list[int]] = [[] for _ in episodes]
    open_ = set(range(count))
    positions, mask, cache = batch.positions, batch.mask, None
    for step in range(MAX_TOKENS):
        with lm_arithmetic(device.type):
            output = lm.model(
                inputs_embeds=rows, attention_mask=mask.to(rows.dtype), position_ids=positions,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            hidden = output.last_hidden_state
            last = hidden[torch.arange(count), asked - 1] if step == 0 else hidden[:, 0]  # [B, D]
            logits = lm.lm_head(last).float().cpu()  # [B, V]
        if step == 0:
            told = torch.tensor([bool(e.memories) and e.mode != "latent" for e in episodes])
            logits[told, unknown_id(parts)] -= prompt.unknown_margin
        cache = output.past_key_values
        chosen = [choice(logits[b], ids[b], sentences[b], prompt) for b in range(count)]
        open_ = {b for b in open_ if chosen[b] not in stop}
        for b in open_:
            ids[b].append(chosen[b])
        if not open_:
            break
        rows = F.embedding(torch.tensor(chosen, device=device), table).float()[:, None]
        positions = (asked + step)[:, None]
        seen = F.pad(seen, (0, 1), value=True)  # [B, N + step + 1]
        mask = torch.zeros(seen.shape, device=device).masked_fill(
            ~seen, torch.finfo(torch.float).min
        )[:, None, None]
    return [parts.tokenizer.decode(found).strip() for found in ids]
