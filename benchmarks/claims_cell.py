"""One cell of the claims table: a connector trained through the frozen LM, and measured.

    python benchmarks/claims_cell.py ARM SEED FRACTION OUT.json [curve]

What stands in a cell, and what the arms are, is told in `claims.py`, which runs this. With "curve"
only the questions of the curve are asked.

The bank is the default model's: captions of 3,462 training pictures. The connector learns from
*other* pictures (emoji of other makers, turned furniture, shapes, scenes), so what is asked about
is never in the bank. Four groups are asked about afterwards:

    known     other makers' pictures of concepts that the bank has a picture of, but that neither
              connector nor key head learned from (every sixth training concept is set aside)
    unknown   pictures of concepts that are neither in the bank nor in training
    shapes    easy-vqa's test pictures
    scenes    composites of held-out things: number, place, colour
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyalign.bank.errors import InputError
from tinyalign.runtime.manifest import MemoryMode
from tinyalign.runtime.prompt import encode_template, similarity_word
from tinyalign.runtime.threads import default_threads
from tinyalign.training import stages
from tinyalign.training.batch import (
    Batch,
    Episode,
    RetrievedMemory,
    Turn,
    answer_logits,
    embed_batch,
    make_batch,
)
from tinyalign.training.features import STYLES, Record
from tinyalign.training.parts import Parts
from tinyalign.training.pipeline import prepare_world
from tinyalign.training.questions import questions_of
from tinyalign.training.recipe import Recipe
from tinyalign.training.world import World, cells_of

Arm = Literal["blind", "baseline", "matched", "random", "latents", "random text", "tinyalign"]
ARMS: tuple[Arm, ...] = (
    "blind", "baseline", "matched", "random", "latents", "random text", "tinyalign",
)  # fmt: skip
GROUPS = ("known", "unknown", "shapes", "scenes")

WORK = Path(__file__).parents[1] / "build" / "claims"  # the key head and the warm start
EPISODES = 1600  # training pictures at 100 % of the data
TURNS = 2  # questions about each
BATCH = 8
MEMORIES = 3
WITHHELD = 0.5  # share of training pictures whose own concept is left out of what they retrieve
# What stands before the picture; in every arm its tokens learn, so that none has to learn from its
# memories, or from tokens in their place, how answers are phrased.
SYSTEM = "<|im_start|>user\nLook at the picture and answer the question in one short sentence.\n"
RATES = {"connector": 1e-3, "prompt": 2e-3, "rag_connector": 3e-4}
WARMUP = 20
SHARES = {"things": 0.6, "shapes": 0.2, "scenes": 0.2}
EACH = 40  # questions of each group and type
CURVE = 96  # of them, asked about along the way
CURVE_POINTS = 10
SET_ASIDE = 6  # one training concept in so many is known to the bank only
BITS = stages.BITS


@dataclasses.dataclass(frozen=True)
class Asked:
    """A test question: its group and type, and the picture's row."""

    group: str
    type: str
    row: int
    turn: Turn


# ---- data


def prepared_world(folder: Path) -> World:
    """Features, the default bank's pictures, and warm parts that no cell has changed.

    The warm start (compressor and RAG connector as an autoencoder of words, stage 0) is trained
    once and kept in ``folder``, in a place of its own for each recipe.
    """
    recipe = Recipe()
    folder = folder / hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
    world = prepare_world(recipe, folder, unseen=lambda record: set_aside(record.concept))
    parts = world.parts
    parts.prompt = dataclasses.replace(parts.prompt, system=SYSTEM)
    parts.to(device())
    run = stages.Run(parts, world, recipe, folder, parts.lm)
    stages.load_checkpoint(run)
    stages.train_bags(run)
    parts.lm = stages.for_training(parts.lm)
    return world


def device() -> torch.device:
    """Where a cell computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_aside(concept: str) -> bool:
    """Whether a training concept is known to the bank only."""
    return hashlib.sha256(f"claims:{concept}".encode()).digest()[0] % SET_ASIDE == 0


def training_episodes(world: World, seed: int) -> list[tuple[int, tuple[Turn, ...]]]:
    """Pictures and questions at 100 % of the data, in the order they are learned from."""
    aside = {r.id for r in world.records if set_aside(r.concept)}
    rows: dict[str, list[int]] = defaultdict(list)
    for row, record in enumerate(world.records):
        if record.split != "train":
            continue
        if record.source in STYLES and record.id not in aside:
            rows["things"].append(row)
        elif record.source == "easy_vqa":
            rows["shapes"].append(row)
        elif record.source == "composites" and not aside & set(record.pictures):
            rows["scenes"].append(row)
    rng = Random(f"claims/{seed}")
    drawn = [
        row
        for sort, share in SHARES.items()
        for row in rng.sample(rows[sort], int(share * EPISODES))
    ]
    rng.shuffle(drawn)
    return [(row, turns_of(world.records[row], rng)) for row in drawn]


def turns_of(record: Record, rng: Random) -> tuple[Turn, ...]:
    """Questions of different types on a picture."""
    types: dict[str, Turn] = {}
    items = questions_of(record, rng)
    rng.shuffle(items)
    for item in items:
        types.setdefault(item.type, Turn(item.question, item.answer))
    return tuple(list(types.values())[:TURNS])


def test_questions(world: World) -> list[Asked]:
    """The test questions, the same for every cell: at most EACH of a group and type."""
    rng = Random("claims/test")
    order = list(range(len(world.records)))
    rng.shuffle(order)
    asked: dict[tuple[str, str], list[Asked]] = defaultdict(list)
    for row in order:
        group = group_of(world.records[row])
        if not group:
            continue
        items = questions_of(world.records[row], rng)
        rng.shuffle(items)
        types: set[str] = set()
        for item in items:
            found = asked[group, item.type]
            if item.type not in types and len(found) < EACH:
                types.add(item.type)
                found.append(Asked(group, item.type, row, Turn(item.question, item.answer)))
    return [question for key in sorted(asked) for question in asked[key]]


def group_of(record: Record) -> str:
    """The test group of a picture, "" where it is of none."""
    if record.source in STYLES:
        if record.split == "held":
            return "unknown"
        return "known" if set_aside(record.concept) else ""
    if record.split == "held":
        return {"easy_vqa": "shapes", "composites": "scenes"}.get(record.source, "")
    return ""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a question: bits and tokens of its answer, whether it is exactly right."""

    asked: Asked
    bits: float
    tokens: int
    right: bool


# ---- arms


class Constant(nn.Module):
    """Learned latents in the place of memories: the same number of tokens, and no information."""

    def __init__(self, latents: int, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(F.normalize(torch.randn(MEMORIES, latents, width), dim=-1))

    def forward(self, words: Tensor, members: Tensor, cells: Tensor) -> Tensor:
        """[K, N, D], [K, C, N], [K, cells, Dv] -> [K, L, d]; K is a multiple of MEMORIES."""
        latents = F.normalize(self.latents, dim=-1)
        return latents.repeat(len(words) // MEMORIES, 1, 1)


def mode_of(arm: Arm) -> MemoryMode:
    """As what memories are read."""
    return "text" if arm in ("tinyalign", "random text") else "latent"


def memories_of(
    world: World, arm: Arm, row: int, question: str, withheld: bool = False
) -> tuple[RetrievedMemory, ...]:
    """What stands in the prompt: nothing, the nearest memories, or random ones in their places."""
    if arm in ("blind", "baseline"):
        return ()
    rng = Random(f"{row}/{question}")
    shown = []
    concept = world.records[row].concept
    found = world.retrieve(row, question, MEMORIES + (30 if withheld else 0))
    if withheld:
        found = [f for f in found if world.records[world.bank[f[0]]].concept != concept]
    for place, score in found[:MEMORIES]:
        word = similarity_word(world.parts.prompt, score, -1.0) or ""
        if arm in ("random", "random text"):
            place = rng.randrange(len(world.bank))
        shown.append(RetrievedMemory(world.bank_texts[place], int(world.bank[place]), word))
    return tuple(shown)


@dataclasses.dataclass
class Cell:
    """What one cell trains."""

    world: World
    arm: Arm
    parts: Parts
    compressor: nn.Module  # Constant in the matched arm
    prompt: nn.Parameter  # [S, D], added to the tokens before the picture

    def loss(self, episodes: Sequence[Episode]) -> tuple[Tensor, Batch, Tensor]:
        """Nats of every answer token [n] of some episodes, the batch, whether each was first."""
        parts, world = self.parts, self.world
        batch = make_batch(episodes, parts.prompt, parts.tokenizer, parts.compressor.shape)
        cells = cells_of(world, batch.image_rows.tolist()).to(device())
        if self.arm == "blind":
            cells = torch.ones_like(cells)
        memory = cells_of(world, batch.memory_rows.tolist()).to(device())
        batch = batch.to(device())
        inputs = embed_batch(
            batch, parts.image_tokens(cells), memory, parts.embeddings,
            self.compressor, parts.rag_connector,  # type: ignore[arg-type]
        )  # fmt: skip
        start = F.pad(self.prompt, (0, 0, 0, inputs.shape[1] - len(self.prompt)))  # [N, D]
        inputs = inputs + start
        with stages.lm_arithmetic(device().type):
            logits, labels = answer_logits(parts.lm, inputs, batch)
        nats = F.cross_entropy(logits, labels, reduction="none")
        return nats, batch, logits.argmax(-1) == labels


def new_cell(world: World, arm: Arm, seed: int) -> Cell:
    """A fresh connector, and the warm memory side; the same for all arms of a seed."""
    torch.manual_seed(seed)
    parts = world.parts
    for module in parts.connector.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    shape = parts.compressor.shape
    before = len(encode_template(parts.tokenizer, SYSTEM))
    prompt = nn.Parameter(torch.zeros(before, shape.width, device=device()))
    constant = Constant(shape.latents, shape.latent_width).to(device())
    return Cell(world, arm, parts, constant if arm == "matched" else parts.compressor, prompt)


def train(
    cell: Cell, seed: int, fraction: float, tests: Sequence[Asked]
) -> Iterator[dict[str, Any]]:
    """Train on the first part of the data, once; yields the curve's points."""
    parts = cell.parts
    data = training_episodes(cell.world, seed)
    data = data[: int(fraction * len(data))]
    groups = {"connector": list(parts.connector.parameters()), "prompt": [cell.prompt]}
    if cell.arm in ("matched", "random", "latents"):
        groups["rag_connector"] = stages.text_parameters(parts)
        if cell.arm == "matched":
            groups["rag_connector"] += list(cell.compressor.parameters())
    for module in (parts.lm, parts.connector, parts.compressor, parts.rag_connector):
        module.requires_grad_(False)
    trained = [p for group in groups.values() for p in group]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": RATES[name]} for name, group in groups.items()], weight_decay=0.01
    )
    steps = len(data) // BATCH
    stage = stages.Stage(steps, BATCH, RATES, WARMUP)
    recent: list[float] = []
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)
        factor = stages.schedule(step, stage)
        for group, rate in zip(optimizer.param_groups, (RATES[n] for n in groups), strict=True):
            group["lr"] = rate * factor
        parts.connector.train()
        episodes = [
            Episode(
                row,
                memories_of(
                    cell.world, cell.arm, row, turns[0].question,
                    cell.arm in ("latents", "tinyalign")
                    and Random(f"{seed}/{row}").random() < WITHHELD,
                ),
                turns,
                mode_of(cell.arm),
            )
            for row, turns in data[step * BATCH : (step + 1) * BATCH]
        ]  # fmt: skip
        loss = cell.loss(episodes)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent.append(loss.item() * BITS)
        if (step + 1) % max(1, round(EPISODES / BATCH / CURVE_POINTS)) == 0 or step + 1 == steps:
            held = measure(cell, some(tests))
            yield {
                "step": step + 1,
                "train_bits": round(sum(recent) / len(recent), 4),
                "held_bits": round(mean_bits(held), 4),
            }
            recent.clear()


def some(tests: Sequence[Asked]) -> list[Asked]:
    """The test questions that the curve is made from: every so-many-th."""
    return list(tests[:: every(len(tests))])


def every(count: int) -> int:
    """How far apart the curve's questions are."""
    return max(1, count // CURVE)


@torch.inference_mode()
def measure(cell: Cell, tests: Sequence[Asked]) -> list[Result]:
    """For every question its bits, answer tokens, and whether greedy decoding answers it exactly.

    Greedy decoding gives the answer exactly if each of its tokens comes first after those before.
    """
    cell.parts.connector.eval()
    results: list[Result] = []
    for start in range(0, len(tests), 2 * BATCH):
        part = tests[start : start + 2 * BATCH]
        episodes = [
            Episode(
                q.row, memories_of(cell.world, cell.arm, q.row, q.turn.question), (q.turn,),
                mode_of(cell.arm),
            )
            for q in part
        ]  # fmt: skip
        nats, batch, first = cell.loss(episodes)
        owner = (batch.labels >= 0).nonzero()[:, 0]
        for number, question in enumerate(part):
            mine = owner == number
            bits = float(nats[mine].sum()) * BITS
            results.append(Result(question, bits, int(mine.sum()), bool(first[mine].all())))
    return results


@torch.inference_mode()
def without_picture(world: World, tests: Sequence[Asked]) -> list[Result]:
    """The frozen language model's bits for every answer, after the question alone."""
    parts = world.parts
    spec = parts.prompt
    stop = encode_template(parts.tokenizer, spec.stop[0])[0]
    results = []
    for question in tests:
        text = spec.system + spec.question.replace("{question}", question.turn.question)
        asked = encode_template(parts.tokenizer, text)
        answer = [*encode_template(parts.tokenizer, question.turn.answer), stop]
        ids = torch.tensor([[*asked, *answer]], device=device())
        rows = F.embedding(ids, parts.embeddings).float()
        with stages.lm_arithmetic(device().type):
            hidden = parts.lm.model(inputs_embeds=rows, use_cache=False).last_hidden_state
            logits = parts.lm.lm_head(hidden[0, len(asked) - 1 : -1]).float()
        nats = F.cross_entropy(logits, ids[0, len(asked) :], reduction="sum")
        results.append(Result(question, float(nats) * BITS, len(answer), False))
    return results


def knn_copy(world: World, tests: Sequence[Asked]) -> dict[str, Any]:
    """How often the nearest memory's name is the answer to a naming question, by group."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question in tests:
        if question.type == "name":
            place, _ = world.retrieve(question.row, question.turn.question, 1)[0]
            name = world.records[world.bank[place]].name
            right[question.group].append(f" {name}." in question.turn.answer)
    return {group: {"right": sum(values), "n": len(values)} for group, values in right.items()}


def mean_bits(results: Sequence[Result]) -> float:
    """Bits a token."""
    return sum(r.bits for r in results) / max(1, sum(r.tokens for r in results))


def packed(results: Sequence[Result]) -> dict[str, Any]:
    """Results as short JSON; the questions are the same in every cell, in the same order."""
    return {
        "bits": [round(r.bits, 2) for r in results],
        "right": "".join("01"[r.right] for r in results),
    }


def main() -> None:
    """Run one cell and write it."""
    arm, seed, fraction, out = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(default_threads())
    out.parent.mkdir(parents=True, exist_ok=True)
    world = prepared_world(WORK)
    tests = test_questions(world)
    started = time.monotonic()
    result: dict[str, Any] = {"arm": arm, "seed": seed, "fraction": fraction, "curve": []}
    if arm == "lm":  # nothing is trained
        results = without_picture(world, tests)
        result |= packed(results) | {"knn_copy": knn_copy(world, tests)}
        result["questions"] = [
            [r.asked.group, r.asked.type, r.tokens, world.records[r.asked.row].id] for r in results
        ]
    elif arm in ARMS:
        cell = new_cell(world, arm, seed)
        for point in train(cell, seed, fraction, tests):
            result["curve"].append(point)
            print(f"{arm} {seed} {fraction}: {point}", file=sys.stderr, flush=True)
        result["trained"] = sum(
            p.numel()
            for m in (cell.parts.connector, cell.parts.rag_connector, cell.compressor)
            for p in m.parameters()
            if p.requires_grad
        )
        result["trained"] += cell.prompt.numel()
        if sys.argv[5:] != ["curve"]:
            result |= packed(measure(cell, tests))
    else:
        raise InputError(f"no such arm: {arm}")
    result["seconds"] = round(time.monotonic() - started)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result) + "\n")
    temporary.replace(out)


if __name__ == "__main__":
    main()
