"""From the answers that `teach.py` got to numbers, tables and a picture."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import interval, markdown
from teach_lessons import LONGEST, Outcome

AIMS = {"name": 0.88, "fact": 0.95, "untold": 0.90}  # with the default bank's memories
LOSS = 0.03  # and at most so much less with the most memories
LABELS = {"name": "name", "fact": "fact", "unseen": "fact of a new kind",
          "untold": "“I do not know.”"}  # fmt: skip
LENGTHS = ((1, 16), (17, 24), (25, 32), (33, LONGEST))  # tokens of a text
Run = dict[str, Any]  # an entry of the results file


# ---- numbers


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One condition in numbers."""
    kinds = by_kind(outcomes)
    told = [o for o in outcomes if o.question.kind != "untold"]
    wrong = [o for o in outcomes if not o.right]
    retrieved = sum(o.memories for o in outcomes)
    numbers = [str(number) for number in (1, 2, 3)]
    ranges = [f"{low}–{high}" for low, high in LENGTHS]
    words = list(dict.fromkeys(o.word for o in sorted(told, key=lambda o: -o.score)))
    return {
        "right": {kind: share(found) for kind, found in kinds.items()},
        "retrieved @1": interval(o.rank == 1 for o in told),
        "retrieved": interval(o.rank > 0 for o in told),
        "copy of the nearest memory": {
            kind: interval(o.copied for o in found)
            for kind, found in kinds.items()
            if kind != "untold"
        },
        "by number of facts": shares_by(outcomes, numbers, lambda o: str(len(o.lesson.values))),
        "by tokens of the text": shares_by(outcomes, ranges, lambda o: length_of(o.lesson.tokens)),
        "by word": shares_by(told, words, lambda o: o.word),
        "by rank": shares_by(told, [str(rank) for rank in range(10)], lambda o: str(o.rank)),
        "tokens of a taught text": round(statistics.fmean(o.lesson.tokens for o in outcomes), 1),
        "LM tokens a memory": round(sum(o.memory_tokens for o in outcomes) / max(1, retrieved), 2),
        "memories a question": round(retrieved / len(outcomes), 2),
        "prompt tokens": round(statistics.fmean(o.prompt_tokens for o in outcomes), 1),
        "retrieve ms": round(statistics.median(o.retrieve_ms for o in outcomes), 2),
        "first token ms": round(statistics.median(o.first_token_ms for o in outcomes), 1),
        "causes": {
            kind: dict(Counter(o.cause for o in found).most_common())
            for kind, found in by_kind(wrong).items()
        },
        "each": {kind: "".join(str(int(o.right)) for o in found) for kind, found in kinds.items()},
        "wrong": [
            {
                "kind": o.question.kind,
                "text": o.lesson.text,
                "asked": o.question.asked,
                "answer": o.answer,
                "rank": o.rank,
                "word": o.word,
                "cause": o.cause,
            }
            for o in wrong
        ],
    }


def by_kind(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by kind of question; kinds that were not asked are left out."""
    return by(outcomes, list(LABELS), lambda o: o.question.kind)


def by(
    outcomes: Iterable[Outcome], order: Sequence[str], key: Callable[[Outcome], str]
) -> dict[str, list[Outcome]]:
    """Outcomes in groups, in the order given, without empty ones."""
    groups: dict[str, list[Outcome]] = {name: [] for name in order}
    for outcome in outcomes:
        groups[key(outcome)].append(outcome)
    return {name: found for name, found in groups.items() if found}


def shares_by(
    outcomes: Iterable[Outcome], order: Sequence[str], key: Callable[[Outcome], str]
) -> dict[str, dict[str, dict[str, float]]]:
    """How many of each kind are right in each group."""
    return {
        name: {kind: share(some) for kind, some in by_kind(found).items()}
        for name, found in by(outcomes, order, key).items()
    }


def share(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """How many are right."""
    return interval(outcome.right for outcome in outcomes)


def length_of(tokens: int) -> str:
    """The range of lengths that a text belongs to."""
    low, high = next(bounds for bounds in LENGTHS if tokens <= bounds[1])
    return f"{low}–{high}"


# ---- tables


def report(run: Run) -> str:
    """A run as Markdown: by number of memories, in parts, elsewhere, what went wrong, the aims."""
    conditions = run["conditions"]
    taught = taught_conditions(run)
    if not taught:
        return f"{title(run)}: nothing was measured after teaching"
    main = taught.get("default") or next(iter(taught.values()))
    last = list(taught.values())[-1]
    lines = [f"**{title(run)}**", "", *condition_table(conditions.get("before"), taught)]
    lines += ["", f"With {main['memories']:,} other memories:", "", *parts_table(main)]
    if "elsewhere" in conditions:
        lines += ["", *elsewhere_table(conditions["elsewhere"])]
    for condition in [main] if main is last else [main, last]:
        lines += ["", f"Wrong answers with {condition['memories']:,} other memories:", ""]
        lines += causes_list(condition)
    if "default" in taught:
        lines += ["", "Aims:", "", *aims_list(taught["default"], last)]
    return "\n".join(lines)


def taught_conditions(run: Run) -> dict[str, Any]:
    """The conditions after teaching."""
    return {name: c for name, c in run["conditions"].items() if name not in ("before", "elsewhere")}


def title(run: Run) -> str:
    """What a run is about."""
    mode = f", memory mode {run['mode']}" if run["mode"] else ""
    return f"{run['n']} things taught by one example each{mode}"


def condition_table(before: dict[str, Any] | None, taught: Mapping[str, Any]) -> list[str]:
    """A line a condition."""
    head = ["other memories", *LABELS.values(), "found first", "found", "copy of the nearest: name",
            "first token, ms", "of that search, ms"]  # fmt: skip
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, c in [("before", before), *taught.items()]:
        if c:
            label = f"{c['memories']:,}" + (", before teaching" if name == "before" else "")
            found = [c["retrieved @1"], c["retrieved"], c["copy of the nearest memory"].get("name")]
            times = [f"{c['first token ms']:.0f}", f"{c['retrieve ms']:.1f}"]
            rows.append([label, *shares(c["right"]), *map(cell, found), *times])
    return markdown(rows)


def parts_table(condition: dict[str, Any]) -> list[str]:
    """Names and facts by number of facts, length of the text and how the taught memory came up."""
    rows = [["", *LABELS.values()], ["---", *["---:"] * len(LABELS)]]
    for number, kinds in condition["by number of facts"].items():
        rows.append([f"{number} {'fact' if number == '1' else 'facts'} told", *shares(kinds)])
    for length, kinds in condition["by tokens of the text"].items():
        rows.append([f"text of {length} tokens", *shares(kinds)])
    for word, kinds in condition["by word"].items():
        label = f"taught memory shown as “{word}”" if word else "taught memory not found"
        rows.append([label, *shares(kinds)])
    for rank, kinds in condition["by rank"].items():
        if rank != "0":
            rows.append([f"taught memory at place {rank}", *shares(kinds)])
    rows.append(["copy of the nearest memory", *shares(condition["copy of the nearest memory"])])
    cost = (
        f"{condition['memories a question']} memories a question, "
        f"{condition['LM tokens a memory']} language model tokens a memory with its heading (a "
        f"taught text has {condition['tokens of a taught text']}), prompts of "
        f"{condition['prompt tokens']:.0f} tokens, {condition['first token ms']:.0f} ms to the "
        "first token."
    )
    return [*markdown(rows), "", cost]


def elsewhere_table(groups: Mapping[str, Any]) -> list[str]:
    """Questions that have nothing to do with the taught things."""
    rows = [["elsewhere", "right before", "right after", "same answer"], ["---", *["---:"] * 3]]
    for group, c in groups.items():
        label = f"{group} (n = {c['equal']['n']})"
        rows.append([label, *map(cell, (c["before"], c["after"], c["equal"]))])
    return markdown(rows)


def causes_list(condition: dict[str, Any]) -> list[str]:
    """Why answers were wrong, a line a kind of question."""
    lines = []
    for kind, causes in condition["causes"].items():
        n = condition["right"][kind]["n"]
        listed = ", ".join(f"{cause} {count}" for cause, count in causes.items())
        lines.append(f"- {LABELS[kind]}, {sum(causes.values())} of {n}: {listed}")
    return lines or ["- none"]


def aims_list(default: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """What is aimed at, and what was reached."""
    lines = []
    for kind, aim in AIMS.items():
        reached = default["right"][kind]["share"]
        verdict = "reached" if reached >= aim else "MISSED"
        memories = f"{default['memories']:,} other memories"
        lines.append(f"- {LABELS[kind]} with {memories}: {reached:.3f}, aim {aim}: {verdict}")
    if last["memories"] > default["memories"]:
        sizes = f"with {last['memories']:,} instead of {default['memories']:,}"
        for kind in AIMS:
            change, half = difference(default["each"][kind], last["each"][kind])
            verdict = "reached" if change >= -LOSS else "MISSED"
            found = f"{change:+.3f} ± {half:.3f}, aim ≥ -{LOSS}: {verdict}"
            lines.append(f"- {LABELS[kind]} {sizes}: {found}")
    return lines


def difference(one: str, two: str) -> tuple[float, float]:
    """By how much the second of two paired rows of "0" and "1" is better, and the half-width of the
    95 % interval of that."""
    changes = np.array([int(b) - int(a) for a, b in zip(one, two, strict=True)])
    return float(changes.mean()), float(1.96 * changes.std() / np.sqrt(len(changes)))


def shares(kinds: Mapping[str, dict[str, float]]) -> list[str]:
    """Table cells of all kinds."""
    return [cell(kinds.get(kind)) for kind in LABELS]


def cell(value: dict[str, float] | None) -> str:
    """A share with its interval."""
    if not value or not value["n"]:
        return ""
    return f"{value['share']:.2f} ({value['low']:.2f}–{value['high']:.2f})"


# ---- the picture

LINES = {  # colour, marker and name of what is drawn
    "retrieved": ("#777777", "", "taught memory found (the bound)"),
    "name": ("#1f4e9c", "o", "name"),
    "fact": ("#d1602b", "s", "fact"),
    "untold": ("#3a8f4d", "^", "“I do not know.” where nobody told"),
    "unseen": ("#8659a5", "D", "fact of a kind that training never saw"),
}


def plot(runs: Sequence[Run], path: Path) -> None:
    """Accuracy against the number of other memories, a panel a memory mode, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (2.4 + 4.4 * len(runs), 4.8)
    figure, panels = pyplot.subplots(1, len(runs), figsize=size, squeeze=False, sharey=True)
    for run, panel in zip(runs, panels[0], strict=True):
        taught = list(taught_conditions(run).values())
        for number, (kind, (colour, marker, label)) in enumerate(LINES.items()):
            values = [c["retrieved"] if kind == "retrieved" else c["right"][kind] for c in taught]
            share, low, high = np.array([(v["share"], v["low"], v["high"]) for v in values]).T
            places = np.arange(len(values)) + (number - 2) * 0.07  # side by side, to be told apart
            style = "--" if kind == "retrieved" else "-"
            panel.plot(places, share, style, marker=marker, color=colour, label=label, markersize=5)
            panel.vlines(places, low, high, color=colour, linewidth=1)
        panel.set_xticks(range(len(taught)), [f"{c['memories']:,}" for c in taught])
        panel.set_xlabel("other memories in the bank")
        panel.set_title(title(run), fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e4e4e4")
        panel.set_axisbelow(True)
        panel.set_ylim(top=1.005)
    panels[0][0].set_ylabel("share of right answers, 95 % intervals")
    names = panels[0][0].get_legend_handles_labels()
    figure.legend(*names, loc="lower center", ncols=2, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
