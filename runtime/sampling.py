"""How the next token is chosen from the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyalign.runtime.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_p`` keeps the likeliest tokens up to that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"the temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"the seed must be 0 or more, not {self.seed}")

    def generator(self) -> np.random.Generator:
        """The random numbers of one answer."""
        return np.random.default_rng(self.seed)


def pick(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """One token id from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).astype(np.float64) / sampling.temperature
    odds = np.exp(scaled)
    odds /= odds.sum()
    if sampling.top_p < 1:
        order = np.argsort(-odds, kind="stable")
        before = np.cumsum(odds[order]) - odds[order]
        odds[order[before >= sampling.top_p]] = 0
        odds /= odds.sum()
    return int(random.choice(len(odds), p=odds))
