"""The default recipe as data: shapes, prompt and how long each stage trains."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from tinyalign.runtime.manifest import PromptSpec
from tinyalign.training.facts import answer_parts
from tinyalign.training.modules import ConnectorShape, MemoryShape

PROMPT = PromptSpec(
    system="<|im_start|>user\n",
    image=(
        "The picture shows",
        4,
        ", a kind of",
        1,
        ". Colour:",
        1,
        ". Number:",
        1,
        ". Place:",
        1,
        ".",
    ),
    memory="\nMemory, {similarity}:",
    memory_end="",
    question="\n{question}<|im_end|>\n<|im_start|>assistant\n",
    # The floors are placeholders; `calibrate` in keys.py measures them on the training pictures.
    similarity=(("same", 0.8), ("close", 0.6), ("similar", 0.4)),
    stop=("<|im_end|>", "<|endoftext|>"),
    top_k=3,
    # Another view of a picture among 12,000 memories, held-out things: where it is found second or
    # third it scores at most 0.1 less than the first in .96 of cases; where it is found first, it
    # is ahead of all others by more than 0.1 in .75, and then stands alone.
    margin=0.1,
    phrases=(
        "I do not know.<|im_end|>",
        "This is a",
        "These are",
        "The picture shows a",
        "There are two",
        "There is one",
        "There is no",
        "Yes, this is a",
        "Yes, there is a",
        "No, this is not a",
        "No, there is no",
        " is a kind of",
        " is on the left.<|im_end|>",
        " is on the right.<|im_end|>",
        " is at the top.<|im_end|>",
        " is at the bottom.<|im_end|>",
        " is in the centre.<|im_end|>",
        *answer_parts(),
    ),
    memory_mode="text",  # reads best: docs/memory-bank.md, "How well teaching works"
)


@dataclass(frozen=True)
class Stage:
    """One training stage: how many steps of how many examples, and its learning rates."""

    steps: int
    batch: int
    rates: dict[str, float]  # parameter group -> learning rate
    warmup: int = 10


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of episode in fine-tuning (the rest has no memory at all)."""

    taught: float = 0.6  # another view of the picture is in the bank, mostly under an invented name
    invented: float = 0.65  # of what was taught: the name is invented
    neighbours: float = 0.20  # only other pictures
    misleading: float = 0.10  # memories of unrelated pictures
    shuffled: float = 0.25  # of all: memories not in the order of their scores
    text: float = 0.5  # of all: memories as their whole text
    both: float = 0.1  # of all: latents and text; the rest latents only
    crowded: float = 0.3  # of what was taught: others are shown however far behind they are
    missing: float = 0.5  # of what was taught: a fact that nobody told is asked for as well
    unknown: float = 0.35  # of all others: likewise


@dataclass(frozen=True)
class Recipe:
    """Everything `tinyalign-train` needs to know besides the data."""

    seed: int = 17
    connector: ConnectorShape = field(default_factory=ConnectorShape)
    memory: MemoryShape = field(default_factory=MemoryShape)
    prompt: PromptSpec = PROMPT
    # Share of the text part in a key. The paper mixes with 0.4; measured here: see
    # docs/architecture.md
    alpha: float = 0.1
    image_key_width: int = 192
    text_key_width: int = 64
    mix: Mix = field(default_factory=Mix)
    lora_rank: int = 16
    lora_alpha: int = 32
    turns: int = 3  # questions an episode asks; they share the picture and the memories
    bags: Stage = Stage(300, 24, {"compressor": 2e-3, "rag_connector": 2e-3})
    slots: Stage = Stage(2000, 128, {"connector": 1.5e-3, "memory_picture": 1.5e-3})
    align: Stage = Stage(50, 8, {"connector": 1e-4, "rag_connector": 2e-4, "copy": 2e-2})
    finetune: Stage = Stage(
        800,
        16,
        {"lora": 8e-4, "connector": 5e-5, "rag_connector": 1e-4, "copy": 1e-2},
        warmup=20,
    )


def recipe_for(vision_width: int, width: int, prompt: PromptSpec, seed: int) -> Recipe:
    """The default recipe with shapes for another encoder, Dv wide, and language model, D wide."""
    latent_width = min(MemoryShape.latent_width, width)
    return Recipe(
        seed=seed,
        connector=ConnectorShape(vision_width=vision_width, width=width),
        memory=MemoryShape(width, vision_width, latent_width=latent_width),
        prompt=prompt,
        image_key_width=min(Recipe.image_key_width, vision_width),
        text_key_width=min(Recipe.text_key_width, width),
    )


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """The recipe with every stage's steps multiplied."""
    changes: dict[str, Stage] = {}
    for item in fields(recipe):
        stage = getattr(recipe, item.name)
        if isinstance(stage, Stage):
            steps = max(1, round(stage.steps * scale))
            changes[item.name] = replace(stage, steps=steps)
    return replace(recipe, **changes)  # type: ignore[arg-type]
