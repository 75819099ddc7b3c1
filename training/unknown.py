"""How sure the model must be that nobody told: the margin of "I do not know."

Fine-tuning asks for missing facts so often that the model learns to say so a little too soon, most
of all of kinds of facts that it never saw. So after training the first token of that answer gets a
handicap (`PromptSpec.unknown_margin`) where memories are read as text. It is set on *training*
things: as high as it can be while KEPT of the questions that are rightly answered so without it
still are.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from tinyalign.training.answer import unknown_id
from tinyalign.training.batch import Episode, Turn, answer_logits
from tinyalign.training.episodes import UNKNOWN, rows_by_source, taught_episode
from tinyalign.training.stages import Run, base_of, embed_episodes, lm_arithmetic

KEPT = 0.95
EPISODES = 200
BATCH = 8
STEP = 0.25  # margins are multiples of it


def calibrated_margin(run: Run) -> float:
    """The highest margin, 0 or more, that keeps enough answers."""
    surplus = margins(run, missing_questions(run))
    answered = surplus[surplus > 0]
    return torch.quantile(answered, 1 - KEPT).item() // STEP * STEP if len(answered) else 0.0


def missing_questions(run: Run) -> list[Episode]:
    """Taught training things, asked for what nobody told; memories are read as text."""
    rows, rng = rows_by_source(run.world.records), Random(f"{run.recipe.seed}/unknown")
    recipe = replace(run.recipe, mix=replace(run.recipe.mix, missing=1.0, crowded=0.0))
    episodes: list[Episode] = []
    while len(episodes) < EPISODES:
        episode = taught_episode(run.world, rows, recipe, rng)
        asked = [turn for turn in episode.turns if turn.answer == UNKNOWN]
        if episode.memories and asked:
            turns = (Turn(asked[0].question, UNKNOWN),)
            episodes.append(replace(episode, turns=turns, mode="text"))
    return episodes


@torch.inference_mode()
def margins(run: Run, episodes: list[Episode]) -> Tensor:
    """How far the first token of "I do not know." is ahead of all others, in logits [n]."""
    unknown = unknown_id(run.parts)
    run.parts.connector.eval()
    found = []
    for start in range(0, len(episodes), BATCH):
        part = episodes[start : start + BATCH]
        batch, inputs = embed_episodes(run, part)
        with lm_arithmetic(run.device.type):
            logits, _ = answer_logits(base_of(run.lm), inputs, batch)  # [S, V]
        owner = (batch.labels >= 0).nonzero()[:, 0]  # [S]
        first = [int((owner == number).nonzero()[0, 0]) for number in range(len(part))]
        rows = logits[first].cpu()  # [n, V]
        mine = rows[:, unknown].clone()
        rows[:, unknown] = -torch.inf
        found.append(mine - rows.amax(1))
    return torch.cat(found)
