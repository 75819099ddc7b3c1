"""Many questions at once: how many a second, one after another and in a batch.

    python benchmarks/throughput.py [--model DIR] [--rounds 5]

48 questions, three about each of 16 pictures (the default bank's thumbnails), with the default
bank. "nothing kept" forgets the picture and the prompt's cache after each question; "one by one"
asks as a program would; "ask_many" gets all of them at once. The answers must be the same.
In turns; medians. Results: benchmarks/results/throughput.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from common import markdown
from latency import machine

from tinyalign.runtime import Answer, TinyAlign
from tinyalign.runtime.paths import default_model_dir
from tinyalign.runtime.threads import default_threads

RESULTS = Path(__file__).parent / "results" / "throughput.json"
QUESTIONS = ("What is this?", "What colour is it?", "Is this an animal?")
PICTURES = 16


def forget(model: TinyAlign) -> None:
    """Drop what was kept of pictures and of the last prompt."""
    model._seen.clear()
    model._spare = None


def ask_afresh(model: TinyAlign, picture: bytes, question: str) -> Answer:
    """An answer in a model that has seen nothing."""
    forget(model)
    return model.ask(picture, question)


def main() -> None:
    """Measure, write the results, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", type=Path, default=default_model_dir())
    parser.add_argument("--rounds", metavar="N", type=int, default=5)
    options = parser.parse_args()
    with TinyAlign.load(options.model) as model:
        seen = [memory.thumbnail for memory in model.banks[0].list() if memory.thumbnail]
        pictures = seen[:: len(seen) // PICTURES][:PICTURES]
        items = [(picture, question) for picture in pictures for question in QUESTIONS]
        ways = {
            "nothing kept": lambda: [ask_afresh(model, *item) for item in items],
            "one by one": lambda: [model.ask(*item) for item in items],
            "ask_many": lambda: model.ask_many(items),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            told = []
            for name, ask in ways.items():
                forget(model)
                started = time.perf_counter()
                told.append(ask())
                times[name].append(time.perf_counter() - started)
            assert len({tuple(a.token_ids for a in answers) for answers in told}) == 1
    tokens = sum(len(answer.token_ids) for answer in told[0])
    found = {
        name: {
            "questions_per_second": len(items) / statistics.median(values),
            "tokens_per_second": tokens / statistics.median(values),
            "seconds": [round(value, 4) for value in values],
        }
        for name, values in times.items()
    }
    result = {"machine": machine(default_threads()), "questions": len(items), "ways": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    rows = [("", "questions a second", "tokens a second"), ("---",) * 3]
    rows += [
        (name, f"{way['questions_per_second']:.1f}", f"{way['tokens_per_second']:.0f}")
        for name, way in found.items()
    ]
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
