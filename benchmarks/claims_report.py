"""The claims' table and plot from the cells that are there (see `claims.py`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from claims_cell import ARMS, BATCH, EPISODES, GROUPS
from common import markdown
from numpy.typing import NDArray

DRAWS = 1000
FULL = 1.0
Name = tuple[str, int, float]
Cells = dict[Name, dict[str, Any]]
Array = NDArray[np.float64]
STEPS = EPISODES // BATCH
PAIRS = (
    ("tinyalign", "baseline"), ("tinyalign", "matched"), ("tinyalign", "random text"),
    ("latents", "baseline"), ("latents", "matched"), ("latents", "random"),
)  # fmt: skip
COLOURS = {arm: f"C{number}" for number, arm in enumerate(ARMS)}


@dataclass(frozen=True, eq=False)
class Table:
    """Results of one arm at one fraction, by seed and question."""

    seeds: tuple[int, ...]
    bits: Array  # [seeds, questions]
    right: Array  # [seeds, questions]


@dataclass(frozen=True, eq=False)
class Questions:
    """The test questions."""

    groups: NDArray[np.str_]  # [questions]
    types: NDArray[np.str_]
    tokens: Array


def questions(cells: Cells) -> Questions:
    """The questions, as the cell of the language model alone lists them."""
    rows = cells["lm", 0, FULL]["questions"]
    groups, types, tokens = (np.array([row[i] for row in rows]) for i in range(3))
    return Questions(groups, types, tokens.astype(float))


def table(
    cells: Cells, arm: str, fraction: float = FULL, seeds: Sequence[int] = ()
) -> Table | None:
    """All seeds of an arm, or those given; None where one is missing."""
    found = {s: c for (a, s, f), c in cells.items() if a == arm and f == fraction}
    if arm == "lm":
        found = dict.fromkeys(seeds or (0,), cells["lm", 0, FULL])
    wanted = tuple(seeds) or tuple(sorted(found))
    if not wanted or not set(wanted) <= set(found):
        return None
    bits = np.array([found[s]["bits"] for s in wanted])
    right = np.array([[letter == "1" for letter in found[s]["right"]] for s in wanted], float)
    return Table(wanted, bits, right)


# ---- intervals


def mean_interval(bits: Array, tokens: Array) -> tuple[float, float]:
    """95 % of the bits a token that other draws of the questions would have given [questions]."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(bits), size=(DRAWS, len(bits)))
    means = bits[drawn].sum(1) / tokens[drawn].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def bootstrap(
    values: Callable[[NDArray[np.int64], NDArray[np.int64]], float], seeds: int, questions: int
) -> tuple[float, float, float]:
    """A number and its 95 % interval, over draws of seeds and of questions."""
    rng = np.random.default_rng(0)
    everything = values(np.arange(seeds), np.arange(questions))
    draws = [
        values(rng.integers(seeds, size=seeds), rng.integers(questions, size=questions))
        for _ in range(DRAWS)
    ]
    return everything, float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def bits_of(one: Table, tokens: Array, chosen: Array) -> tuple[float, float, float]:
    """Bits a token over the chosen questions [q]."""
    bits, counts = one.bits[:, chosen], tokens[chosen]
    return bootstrap(
        lambda s, q: float(bits[np.ix_(s, q)].sum() / (len(s) * counts[q].sum())), *bits.shape
    )


def drop_of(one: Table, other: Table, tokens: Array, chosen: Array) -> tuple[float, float, float]:
    """How many bits a token ``one`` saves against ``other``, paired by seed and question."""
    less, counts = (other.bits - one.bits)[:, chosen], tokens[chosen]
    return bootstrap(
        lambda s, q: float(less[np.ix_(s, q)].sum() / (len(s) * counts[q].sum())), *less.shape
    )


def share_of(one: Table, chosen: Array) -> tuple[float, float, float]:
    """Share of the chosen questions that are answered exactly."""
    right = one.right[:, chosen]
    return bootstrap(lambda s, q: float(right[np.ix_(s, q)].mean()), *right.shape)


def shown(value: tuple[float, float, float], places: int = 2) -> str:
    """A number with its interval."""
    return "{:.{p}f} ({:.{p}f} to {:.{p}f})".format(*value, p=places)


# ---- the report


def report(cells: Cells) -> str:
    """Markdown tables of what is there so far."""
    q = questions(cells)
    everything = np.ones(len(q.tokens), bool)
    full = {arm: t for arm in ARMS if (t := table(cells, arm)) is not None}
    seeds = {arm: list(t.seeds) for arm, t in full.items()}
    done = ", ".join(f"{arm} {len(found)}" for arm, found in seeds.items())
    lines = [f"Seeds of every arm at 100 % of the data: {done}.", ""]
    if set(full) == set(ARMS):
        lines += ["## In short", "", *in_short(cells, q), ""]
    lines += ["## Held-out loss, bits an answer token", ""]
    lines += _rows(["arm", "all", *GROUPS, "parameters trained"])
    for arm, t in full.items():
        picks = [everything, *(q.groups == group for group in GROUPS)]
        trained = cells[arm, t.seeds[0], FULL]["trained"]
        numbers = [shown(bits_of(t, q.tokens, pick)) for pick in picks]
        lines += _row([arm, *numbers, f"{trained:,}"])
    lines += ["", "Less than others have (paired; share of the other's loss in brackets):", ""]
    lines += _rows(["arm", "against", "all", *GROUPS])
    for arm, other in PAIRS:
        lines += _row([arm, other, *_against(cells, q, arm, other)])
    lines += ["", "## Steps", "", *steps(cells)]
    lines += ["", "## Right answers (word for word), by type", "", *accuracy(cells, q, full)]
    lines += ["", "## Less data", "", *data(cells, q)]
    lines += ["", "## Effective mutual information, bits an answer token", "", *emi(cells, q)]
    return "\n".join(lines)


def in_short(cells: Cells, q: Questions) -> list[str]:
    """What was claimed or aimed at, and what was measured."""
    everything = np.ones(len(q.tokens), bool)

    def less(other: str, group: str = "") -> str:
        shared = _shared(cells, ("tinyalign", other))
        one, two = (table(cells, arm, FULL, shared) for arm in ("tinyalign", other))
        assert one is not None and two is not None
        pick = everything if not group else q.groups == group
        drop = drop_of(one, two, q.tokens, pick)
        whole = bits_of(two, q.tokens, pick)[0]
        return "{:.0%} ({:.0%} to {:.0%})".format(*(value / whole for value in drop))

    seeds = _shared(cells, ("baseline", "tinyalign"))
    reached = ", ".join(_reached(cells, "tinyalign", seed) for seed in seeds)
    base = table(cells, "baseline")
    assert base is not None
    share = share_of(base, everything)[0]
    enough = [
        f for f in sorted({f for *_, f in cells})
        if (t := table(cells, "tinyalign", f)) is not None and share_of(t, everything)[0] >= share
    ]  # fmt: skip
    mine = table(cells, "tinyalign")
    assert mine is not None
    names = (q.groups == "known") & (q.types == "name")
    copy = cells["lm", 0, FULL]["knn_copy"]["known"]
    rows = [
        ("claim or aim", "measured"),
        ("---", "---"),
        ("held-out loss at least 15 % below the baseline's", less("baseline")),
        (
            "and below the controls'",
            f"matched {less('matched')}, random text {less('random text')}",
        ),
        ("of this on known things", less("baseline", "known")),
        ("the baseline's last loss is reached in half of the steps", f"in {reached} of the steps"),
        (
            "the baseline's accuracy with 40 % of the data",
            f"reached with {enough[0]:.0%}" if enough else "not reached",
        ),
        (
            "known things named better than by copying the nearest memory's name",
            f"{share_of(mine, names)[0]:.2f} against {copy['right'] / copy['n']:.2f}",
        ),
    ]
    return markdown(rows)


def _against(cells: Cells, q: Questions, arm: str, other: str) -> list[str]:
    shared = _shared(cells, (arm, other))
    one, two = table(cells, arm, FULL, shared), table(cells, other, FULL, shared)
    if not shared or one is None or two is None:
        return ["not run"] * (1 + len(GROUPS))
    found = []
    for group in ("", *GROUPS):
        pick = (q.groups == group) | (not group)
        less = drop_of(one, two, q.tokens, pick)
        whole = bits_of(two, q.tokens, pick)[0]
        found.append(f"{shown(less)} [{less[0] / whole:.0%}]")
    return found


def _shared(cells: Cells, arms: Sequence[str], fraction: float = FULL) -> list[int]:
    """Seeds for which all these arms were run."""
    sets = [{s for a, s, f in cells if a == arm and f == fraction} for arm in arms if arm != "lm"]
    return sorted(set.intersection(*sets)) if sets else []


def steps(cells: Cells) -> list[str]:
    """When each arm's held-out loss is as low as the baseline's last."""
    lines = _rows(["seed", "baseline's last held-out loss", *(f"{arm}, steps" for arm in ARMS[2:])])
    for seed in _shared(cells, ("baseline", "tinyalign")):
        last = cells["baseline", seed, FULL]["curve"][-1]["held_bits"]
        lines += _row([str(seed), f"{last:.3f}", *(_reached(cells, arm, seed) for arm in ARMS[2:])])
    return lines


def _reached(cells: Cells, arm: str, seed: int) -> str:
    cell = cells.get((arm, seed, FULL))
    if cell is None:
        return "not run"
    last = cells["baseline", seed, FULL]["curve"][-1]["held_bits"]
    reached = [p["step"] for p in cell["curve"] if p["held_bits"] <= last]
    return f"{reached[0] / STEPS:.0%}" if reached else "not reached"


def accuracy(cells: Cells, q: Questions, full: dict[str, Table]) -> list[str]:
    """Share of exact answers by group and type, and the plain copy of the nearest memory."""
    copies = cells["lm", 0, FULL]["knn_copy"]
    lines = _rows(["group", "type", "n", *full, "copy of the nearest name"])
    for group in GROUPS:
        for kind in ["", *sorted(set(q.types[q.groups == group]))]:
            pick = (q.groups == group) & ((q.types == kind) | (not kind))
            copy = copies.get(group) if kind == "name" else None
            told = f"{copy['right'] / copy['n']:.2f}" if copy else ""
            shares = [shown(share_of(t, pick)) for t in full.values()]
            lines += _row([group, kind or "all", str(int(pick.sum())), *shares, told])
    return lines


def data(cells: Cells, q: Questions) -> list[str]:
    """Loss and accuracy against the share of the training data."""
    lines = _rows(
        ["data", *(f"{a}, {w}" for a in ("baseline", "tinyalign") for w in ("bits", "right"))]
    )
    pick = np.ones(len(q.tokens), bool)
    for fraction in sorted({f for *_, f in cells}):
        row = [f"{fraction:.0%}"]
        for arm in ("baseline", "tinyalign"):
            t = table(cells, arm, fraction)
            row += (
                [shown(bits_of(t, q.tokens, pick)), shown(share_of(t, pick), 3)]
                if t is not None
                else ["not run"] * 2
            )
        lines += _row(row)
    return lines


def emi(cells: Cells, q: Questions) -> list[str]:
    """Bits saved against the language model alone and against the blind connector."""
    lines = _rows(
        ["group", "type", "picture, against lm", "picture and memory, against lm",
         "picture, against blind", "picture and memory, against blind"]
    )  # fmt: skip
    for group in GROUPS:
        for kind in ["", *sorted(set(q.types[q.groups == group]))]:
            pick = (q.groups == group) & ((q.types == kind) | (not kind))
            row = [group, kind or "all"]
            for without in ("lm", "blind"):
                for arm in ("baseline", "tinyalign"):
                    shared = _shared(cells, (arm, without))
                    one = table(cells, arm, FULL, shared) if shared else None
                    two = table(cells, without, FULL, shared) if shared else None
                    known = one is not None and two is not None
                    row.append(shown(drop_of(one, two, q.tokens, pick)) if known else "not run")
            lines += _row(row)
    return lines


def _row(cells: Sequence[str]) -> list[str]:
    return markdown([cells])


def _rows(head: Sequence[str]) -> list[str]:
    return markdown([head, ["---"] * len(head)])


# ---- the plot


def plot(cells: Cells, file: Path) -> None:
    """Curves of loss, accuracy by data, and EMI by group."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    q = questions(cells)
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8))
    for panel, key, title in (
        (axes[0, 0], "train_bits", "training loss, bits an answer token"),
        (axes[0, 1], "held_bits", "held-out loss, bits an answer token"),
    ):
        for arm in ARMS:
            curves = [c["curve"] for (a, _, f), c in cells.items() if a == arm and f == FULL]
            if curves:
                shared = range(min(map(len, curves)))
                x = [curves[0][i]["step"] for i in shared]
                y = [np.mean([curve[i][key] for curve in curves]) for i in shared]
                panel.plot(x, y, marker="o", ms=3, label=arm, color=COLOURS[arm])
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    everything = np.ones(len(q.tokens), bool)
    for arm in ("baseline", "tinyalign"):
        points = [
            (f, *share_of(t, everything))
            for f in sorted({f for *_, f in cells})
            if (t := table(cells, arm, f)) is not None
        ]
        if points:
            x, y, low, high = (np.array(column) for column in zip(*points, strict=True))
            error = [np.maximum(0, y - low), np.maximum(0, high - y)]
            axes[1, 0].errorbar(100 * x, y, error, marker="o", ms=4, capsize=3, label=arm,
                                color=COLOURS[arm])  # fmt: skip
            if arm == "baseline":
                axes[1, 0].axhline(y[-1], color=COLOURS[arm], ls=":", lw=1)
    axes[1, 0].set_title("right answers (word for word)", fontsize=10)
    axes[1, 0].set_xlabel("share of the training data, %")
    axes[1, 0].legend(fontsize=8)
    axes[1, 0].grid(alpha=0.3)
    without = "blind" if _shared(cells, ("blind", "tinyalign")) else "lm"
    width = 0.38
    for place, arm in enumerate(("baseline", "tinyalign")):
        shared = _shared(cells, (arm, without))
        one = table(cells, arm, FULL, shared) if shared else None
        two = table(cells, without, FULL, shared) if shared else None
        if one is None or two is None:
            continue
        found = [drop_of(one, two, q.tokens, q.groups == group) for group in GROUPS]
        y, low, high = (np.array(column) for column in zip(*found, strict=True))
        at = np.arange(len(GROUPS)) + (place - 0.5) * width
        error = [np.maximum(0, y - low), np.maximum(0, high - y)]
        axes[1, 1].bar(at, y, width, yerr=error, capsize=3, label=arm, color=COLOURS[arm])
    axes[1, 1].set_xticks(range(len(GROUPS)), GROUPS)
    axes[1, 1].set_title(f"effective mutual information against {without}, bits", fontsize=10)
    axes[1, 1].legend(fontsize=8)
    axes[1, 1].grid(alpha=0.3, axis="y")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
