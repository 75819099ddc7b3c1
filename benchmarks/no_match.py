"""Decoding where nothing can be repeated: what drafts cost when they are of no use.

    python benchmarks/no_match.py [--model DIR] [--rounds 9]

The default model's language model goes on with 16 pieces of English (Python's own documentation),
48 tokens each, and no memory, phrase or earlier sentence is there to repeat. "a row a run" is plain
decoding by single rows; "answers" is what the runtime does: two rows a run, the second the guess of
the likeliest next token. In turns; medians, and the median of the rounds' own ratios. Results:
benchmarks/results/no_match.json.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import time
from pathlib import Path

import numpy as np
from common import markdown
from latency import machine

from tinyalign.runtime import TinyAlign
from tinyalign.runtime.decode import continue_answer
from tinyalign.runtime.paths import default_model_dir
from tinyalign.runtime.prompt import encode_text
from tinyalign.runtime.threads import default_threads

RESULTS = Path(__file__).parent / "results" / "no_match.json"
PIECES, READ, WRITTEN = 16, 64, 48  # pieces of so many tokens, and tokens after each


def plain(model: TinyAlign, ids: list[int]) -> tuple[float, int, int]:
    """Decode token by token, one row a run: (seconds, tokens, runs)."""
    lm, table = model.parts.lm, model.parts.embeddings
    state = lm.new_state(READ + WRITTEN + 2)
    token = int(lm.forward(state, table[ids].astype(np.float32))[0].argmax())
    began = time.perf_counter()
    for _ in range(WRITTEN - 1):
        token = int(lm.forward(state, table[[token]].astype(np.float32))[0].argmax())
    return time.perf_counter() - began, WRITTEN - 1, WRITTEN - 1


def answered(model: TinyAlign, ids: list[int]) -> tuple[float, int, int]:
    """Decode as answers are decoded, with nothing to repeat."""
    parts = model.parts
    state = parts.lm.new_state(READ + WRITTEN + 2)
    token = int(parts.lm.forward(state, parts.embeddings[ids].astype(np.float32))[0].argmax())
    began = time.perf_counter()
    runs = continue_answer(
        parts.lm, state, parts.embeddings, token, lambda logits, _: int(logits.argmax()),
        frozenset(), WRITTEN, None, parts.next_tokens,
    )  # fmt: skip
    new = [len(found) for found in runs]
    return time.perf_counter() - began, sum(new), len(new)


def main() -> None:
    """Measure, write the results, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", type=Path, default=default_model_dir())
    parser.add_argument("--rounds", metavar="N", type=int, default=9)
    options = parser.parse_args()
    ways = {"a row a run": plain, "answers": answered}
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    with TinyAlign.load(options.model, banks=[]) as model:
        text = "\n".join(pydoc_data.topics.topics.values())
        ids = list(encode_text(model.parts.tokenizer, text))
        starts = range(0, len(ids) - READ, len(ids) // PIECES)[:PIECES]
        pieces = [ids[start : start + READ] for start in starts]
        runs = dict.fromkeys(ways, 0.0)
        for _ in range(options.rounds):
            for name, way in ways.items():
                found = [way(model, piece) for piece in pieces]
                rounds[name].append(1000 * sum(f[0] for f in found) / sum(f[1] for f in found))
                runs[name] = sum(f[2] for f in found) / sum(f[1] for f in found)
    ratio = statistics.median(
        a / b for a, b in zip(rounds["answers"], rounds["a row a run"], strict=True)
    )
    result = {
        "machine": machine(default_threads()),
        "ms_a_token": rounds,
        "runs_a_token": runs,
        "answers_by_a_row_a_run": ratio,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    rows = [["", "ms a token", "runs a token"]]
    rows += [[n, f"{statistics.median(rounds[n]):.2f}", f"{runs[n]:.2f}"] for n in ways]
    print("\n".join(markdown(rows)))
    print(f"answers take {ratio:.2f} of the time of a row a run")


if __name__ == "__main__":
    main()
