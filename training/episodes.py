"""Episodes for alignment and fine-tuning: what is asked about a picture, with which memories at
hand.

Four kinds teach when to trust the bank (shares in `recipe.Mix`):
    taught       another view of the picture is in the bank, mostly under an invented name with
                 invented facts, so that only reading the memory can answer
    neighbours   only memories of other pictures: name what the picture shows, not what they say
    misleading   memories of unrelated pictures
    none         no memory
A fact that no memory holds is answered with "I do not know."
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from tinyalign.runtime.manifest import MemoryMode
from tinyalign.runtime.prompt import relevant, similarity_word
from tinyalign.training.batch import Episode, RetrievedMemory, Turn
from tinyalign.training.facts import (
    Attribute,
    Fact,
    attribute_named,
    draw_attribute,
    draw_fact,
    invented_name,
)
from tinyalign.training.features import Record
from tinyalign.training.questions import noun_phrase, questions_of, sentence
from tinyalign.training.recipe import Mix, Recipe
from tinyalign.training.world import SHOWN, World

UNKNOWN = "I do not know."
NAME_QUESTIONS = (
    "What is this?",
    "What does the picture show?",
    "What is it called?",
    "What is in the picture?",
    "Name this.",
)
# How often each source is asked about.
SHARES = {
    "emoji": 30,
    "clipart": 20,
    "furniture": 8,
    "prototypes": 12,
    "easy_vqa": 14,
    "composites": 20,
    "llava": 50,  # where there is --data
}


@dataclass(frozen=True)
class Taught:
    """What a memory says that was taught by hand: a name, facts, and the text telling both."""

    name: str
    facts: tuple[Fact, ...]
    text: str


def rows_by_source(
    records: Sequence[Record], sources: Sequence[str] = tuple(SHARES), split: str = "train"
) -> dict[str, list[int]]:
    """Rows of every source on one side of the split."""
    rows: dict[str, list[int]] = {source: [] for source in sources}
    for row, record in enumerate(records):
        if record.split == split and record.source in rows:
            rows[record.source].append(row)
    return {source: found for source, found in rows.items() if found}


@dataclass(frozen=True)
class Found:
    """A memory as search found it."""

    score: float
    text: str
    row: int  # of its picture's features


def draw_episode(world: World, rows: dict[str, list[int]], recipe: Recipe, rng: Random) -> Episode:
    """Draw one episode of the recipe's mix."""
    mix = recipe.mix
    chance = rng.random()
    if chance < mix.taught:
        episode = taught_episode(world, rows, recipe, rng)
    else:
        row = draw_row(rows, rng)
        turns = visual_turns(world.records[row], recipe.turns, rng)
        if rng.random() < mix.unknown:
            turns = (*turns[: recipe.turns - 1], Turn(draw_fact(rng).ask, UNKNOWN))
        if chance < mix.taught + mix.neighbours:
            memories = neighbours(world, row, turns[0].question, recipe)
        elif chance < mix.taught + mix.neighbours + mix.misleading:
            memories = misleading(world, row, recipe, rng)
        else:
            memories = ()
        episode = Episode(row, memories, turns)
    if rng.random() < mix.shuffled:
        shuffled = list(episode.memories)
        rng.shuffle(shuffled)
        episode = replace(episode, memories=tuple(shuffled))
    modes: tuple[MemoryMode, ...] = ("text", "both", "latent")
    shares = (mix.text, mix.both, 1 - mix.text - mix.both)
    return replace(episode, mode=rng.choices(modes, shares)[0])


def aligned_episode(
    world: World, rows: dict[str, list[int]], recipe: Recipe, rng: Random
) -> Episode:
    """An episode of the alignment stage: visual questions with retrieved neighbours."""
    row = draw_row(rows, rng)
    turns = visual_turns(world.records[row], recipe.turns, rng)
    return Episode(row, neighbours(world, row, turns[0].question, recipe), turns)


def draw_row(
    rows: dict[str, list[int]], rng: Random, sources: Sequence[str] = tuple(SHARES)
) -> int:
    """A training row, its source drawn by share."""
    names = [source for source in sources if source in rows]
    source = rng.choices(names, weights=[SHARES[name] for name in names])[0]
    return rng.choice(rows[source])


def visual_turns(record: Record, count: int, rng: Random) -> tuple[Turn, ...]:
    """Questions of different types that the picture alone answers."""
    by_type: dict[str, list[Turn]] = {}
    items = questions_of(record, rng)
    if record.source == "llava":
        picked = rng.sample(items, min(count, len(items)))
        return tuple(Turn(item.question, item.answer) for item in picked)
    for item in items:
        by_type.setdefault(item.type, []).append(Turn(item.question, item.answer))
    types = list(by_type)
    rng.shuffle(types)
    if "name" in types:  # naming is what people ask most
        types.remove("name")
        types.insert(0, "name")
    turns = [rng.choice(by_type[kind]) for kind in types[:count]]
    rng.shuffle(turns)
    return tuple(turns)


def show(
    world: World, found: Sequence[Found], crowded: bool = False
) -> tuple[RetrievedMemory, ...]:
    """What was found, best first, as the prompt shows it: without what is under the score floor
    and, unless `crowded`, without what is far behind the best."""
    prompt = world.parts.prompt
    scores = [memory.score for memory in found]
    used = found if crowded else found[: relevant(prompt, scores)]
    words = [similarity_word(prompt, memory.score) for memory in used]
    return tuple(
        RetrievedMemory(memory.text, memory.row, word)
        for memory, word in zip(used, words, strict=True)
        if word
    )


def found_near(world: World, row: int, question: str, count: int) -> list[Found]:
    """The nearest memories of other pictures, with their places in the bank."""
    return [
        Found(score, world.bank_texts[place], int(world.bank[place]))
        for place, score in world.retrieve(row, question, count)
    ]


def neighbours(
    world: World, row: int, question: str, recipe: Recipe
) -> tuple[RetrievedMemory, ...]:
    """The nearest memories of other pictures."""
    return show(world, found_near(world, row, question, recipe.prompt.top_k))


def misleading(world: World, row: int, recipe: Recipe, rng: Random) -> tuple[RetrievedMemory, ...]:
    """Memories of unrelated pictures, with the similarity words that the real ones would have
    had."""
    found = []
    for near in found_near(world, row, NAME_QUESTIONS[0], recipe.prompt.top_k):
        place = rng.randrange(len(world.bank))
        if world.records[world.bank[place]].id != world.records[row].id:
            found.append(Found(near.score, world.bank_texts[place], int(world.bank[place])))
    return show(world, found)


def draw_taught(
    world: World,
    record: Record,
    rng: Random,
    attributes: Sequence[str] = (),
    invented: float = Mix.invented,
) -> Taught:
    """Invent what a person may tell about a picture. `attributes` names kinds of facts that must be
    among it.

    The name is `invented` in that share of cases, else the picture's own or, as often, another
    thing's: a memory is right also where it says what the picture does not look like.
    """
    chance = rng.random()
    name = invented_name(rng)
    if chance >= (1 + invented) / 2:
        name = record.name or name
    elif chance >= invented:
        name = world.records[rng.choice(world.bank)].name or name
    facts = [draw_fact(rng, attribute_named(attribute, rng)) for attribute in attributes]
    while len(facts) < rng.choice([0, 1, 1, 2, 2, 3]):
        fact = draw_fact(rng)
        if fact.attribute not in {known.attribute for known in facts}:
            facts.append(fact)
    rng.shuffle(facts)
    opening = rng.choice(
        [
            "This is {a}.",
            "This is {a}.",
            "{A}.",
            "It is {a}.",
            "This is called {n}.",
            "This thing is {a}.",
            "{A} can be seen.",
        ]
    )
    named = noun_phrase(name)
    text = opening.format(a=named, A=named[:1].upper() + named[1:], n=name)
    return Taught(name, tuple(facts), " ".join([text, *(fact.tell for fact in facts)]))


def taught_episode(
    world: World, rows: dict[str, list[int]], recipe: Recipe, rng: Random
) -> Episode:
    """Another view of the picture is in the bank with a taught text; ask for its name and facts."""
    row = draw_row(rows, rng, SHOWN)
    record = world.records[row]
    others = [other for other in world.views[record.id] if other != row]
    remembered = rng.choice(others) if others else row
    taught = draw_taught(world, record, rng, invented=recipe.mix.invented)
    missing = draw_missing(taught, recipe, rng)
    turns = taught_turns(record, taught, missing, recipe, rng)
    score = float(world.key(row, turns[0].question) @ world.key(remembered, taught.text))
    found = found_near(world, row, turns[0].question, 3)
    if rng.random() < 0.5:  # other memories were taught too, often with the same kinds of fact
        asked = [fact.attribute for fact in taught.facts] + [m.name for m in missing]
        found = [replace(near, text=rival(world, near.row, asked, rng)) for near in found]
    found = sorted([*found, Found(score, taught.text, remembered)], key=lambda near: -near.score)
    found = found[: recipe.prompt.top_k]
    memories = show(world, found, crowded=rng.random() < recipe.mix.crowded)
    if not any(memory.text == taught.text for memory in memories):  # not found: nothing was taught
        missed = tuple(
            Turn(turn.question, UNKNOWN) for turn in turns if turn.answer != UNKNOWN
        )[:1]  # fmt: skip
        turns = (
            *visual_turns(record, 2, rng),
            *(t for t in missed if t.question not in NAME_QUESTIONS),
        )
    return Episode(row, memories, turns)


def rival(world: World, row: int, asked: Sequence[str], rng: Random) -> str:
    """A taught text for another memory, mostly with facts of the kinds that are asked about."""
    told = min(len(asked), rng.choice([0, 1, 1, 2]))
    attributes = rng.sample(asked, told)
    return draw_taught(world, world.records[row], rng, attributes).text


def draw_missing(taught: Taught, recipe: Recipe, rng: Random) -> tuple[Attribute, ...]:
    """A kind of fact that the taught text does not tell, to be asked about; often none."""
    if rng.random() >= recipe.mix.missing:
        return ()
    known = {fact.attribute for fact in taught.facts}
    missing = draw_attribute(rng)
    while missing.name in known:
        missing = draw_attribute(rng)
    return (missing,)


def taught_turns(
    record: Record, taught: Taught, missing: Sequence[Attribute], recipe: Recipe, rng: Random
) -> tuple[Turn, ...]:
    """Questions whose answers stand in the taught text, one that no memory answers, one on
    looks."""
    count = recipe.turns
    turns = [Turn(rng.choice(NAME_QUESTIONS), sentence(taught.name))]
    turns += [Turn(fact.ask, fact.answer) for fact in taught.facts[: count - 1]]
    turns += [Turn(rng.choice(attribute.asks), UNKNOWN) for attribute in missing]
    if rng.random() < 0.15:
        answer = f"Yes, this is {noun_phrase(taught.name)}."
        turns.append(Turn(f"Is this {noun_phrase(taught.name)}?", answer))
    if rng.random() < 0.2:
        looks = [
            item for item in questions_of(record, rng) if item.type in ("colour", "kind", "count")
        ]
        turns += [Turn(item.question, item.answer) for item in looks[:1]]
    rng.shuffle(turns)
    return tuple(turns[: count + 1])
