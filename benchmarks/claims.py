"""The paper's claims, one by one, on our data: what does retrieval add?

    python benchmarks/claims.py [--seeds 0 1 2] [--minutes 60] [--quick]

Every cell trains a connector through the frozen language model and answers the same test questions.
What differs between the arms:

    lm           nothing is trained and no picture is seen: the language model alone
    blind        the connector sees the same grey picture always: what can be learned without looking
    baseline     the picture only
    matched      the picture, and as many further tokens as memories' latents would take, from
                 learned latents through the same warm-started RAG connector: no memories
    random       the same with the latents of random memories (similarity words as if found)
    latents      the same with the latents of the three nearest memories, as in the paper
    random text  the picture and the texts of random memories
    tinyalign    the picture and the texts of the three nearest memories, as the default model has it

Same data in the same order, same steps, rates and connector start for all arms of a seed, and in
all of them the tokens before the picture learn. What latents have over matched and random, and
tinyalign over random text, is retrieval. For half of the training pictures the memories of their
own concept are left out, so that a memory is not always right. Retrieval sees the picture and the question; no
test picture is in the bank. Data and test groups are described in `claims_cell.py`.

Bits are negative log2 probabilities of an answer token (teacher forcing); an answer is right if
greedy decoding gives it word for word. EMI, effective mutual information, is the drop of these
bits against a model that does not see the picture (predictive V-information, arXiv 2002.10689),
here against `lm` as the paper has it, and against `blind`, which knows how answers are phrased.
Intervals are 95 % (bootstrap over seeds and questions, 1,000 draws; differences are paired).

A cell takes some minutes and is kept in benchmarks/results/claims/; a run goes on where the last
one ended. To run one again, delete its file. `--quick` runs one small cell anew, and compares it
with the one that is kept. Needs the feature cache of `tinyalign-train --until prepare`.
"""

# ruff: noqa: E501 - HEAD is a document
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims_cell import every
from claims_report import FULL, Name, mean_interval, plot, report

HERE = Path(__file__).parent
CELLS = HERE / "results" / "claims"
DOCUMENT = HERE.parent / "docs" / "claims.md"
FRACTIONS = (0.4, 0.2, 0.6, 0.8)
QUICK = ("tinyalign", 0, 0.2)
HEAD = """\
# The paper's claims on our data

TinyAlign (arXiv 2505.12884) says that retrieved memories lower the training loss, speed convergence, raise accuracy
and reach the baseline with 40 % of the fine-tuning data, because the language model takes in more: they raise its
*effective mutual information* (EMI). `python benchmarks/claims.py` measures each, with frozen encoder and frozen
language model as in the paper, and with controls:

| arm | what the language model is given before the question |
| --- | --- |
| lm | nothing, and nothing is trained |
| blind | image tokens of one and the same grey picture: what can be learned without looking |
| baseline | image tokens |
| matched | image tokens, and as many learned tokens as memories' latents take, through the same warm-started RAG connector |
| random | image tokens and the latents of three random memories |
| latents | image tokens and the latents of the three nearest memories: the paper's form |
| random text | image tokens and the texts of three random memories |
| tinyalign | image tokens and the texts of the three nearest memories: the default model's form |

All arms of a seed see the same questions in the same order, for the same steps, from the same start; in all of them the
tokens before the picture learn too, so that none has to learn from memories how answers are phrased. What *latents* has
over *matched* and *random*, and *tinyalign* over *random text*, is retrieval. For half of the training pictures the
memories of their own concept are left out of what is retrieved: otherwise a memory is right more often in training
than later, and is trusted too much (with `WITHHELD = 0` in `claims_cell.py` the last training loss was 0.82 to 0.93 bits
instead of 1.26 to 1.52, and the last held-out loss of the curve 2.00 to 2.05 instead of 1.90 to 1.98).
No picture that is asked about is in the bank, and retrieval sees picture and question only.

The connector starts from nothing and sees 1,600 pictures: a small training run, so that a cell takes ten minutes on two
cores. It is not the default model, whose accuracy stands in [the model card](model-card.md).

Four groups of questions are held out: *known* (pictures by other makers of concepts of which the bank holds one
picture, and of which neither the connector nor the key head saw any), *unknown* (of concepts that nobody knows), *shapes*
(easy-vqa's test pictures) and *scenes* (of held-out things).

EMI is how many bits an answer token costs less than without the picture. The paper's definition takes the same language
model without picture (`lm`). That also counts what any training teaches about how answers are phrased; so
it stands here against `blind` too, which is predictive V-information (arXiv 2002.10689) with this language model
as the family of predictors. Brackets are 95 % intervals over seeds and questions.

![curves](claims.png)

"""


def cells(seeds: Sequence[int]) -> list[Name]:
    """All cells, the most telling ones first."""
    wanted: list[Name] = [("lm", 0, FULL)]
    first = ("baseline", "tinyalign", "matched", "random text")
    wanted += [(arm, seed, FULL) for seed in seeds for arm in first]
    wanted += [(arm, seed, FULL) for seed in seeds for arm in ("latents", "random", "blind")]
    wanted += [
        (arm, seed, fraction)
        for fraction in FRACTIONS
        for seed in seeds
        for arm in ("tinyalign", "baseline")
    ]
    return wanted


def file_of(name: Name, folder: Path = CELLS) -> Path:
    """Where a cell is kept."""
    arm, seed, fraction = name
    return folder / f"{arm.replace(' ', '_')}-{seed}-{fraction}.json"


def run(name: Name, folder: Path, *more: str) -> dict[str, Any]:
    """Train and measure a cell in a process of its own."""
    file = file_of(name, folder)
    command = [sys.executable, str(HERE / "claims_cell.py"), *map(str, name), str(file), *more]
    if subprocess.run(command).returncode:
        sys.exit(f"the cell {name} failed")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def quick() -> None:
    """One small cell again, its curve only: exit code 1 if it does not end where the kept one did,
    within the interval of that."""
    kept = json.loads(file_of(QUICK).read_text())
    questions = json.loads(file_of(("lm", 0, FULL)).read_text())["questions"]
    step = every(len(questions))
    tokens = np.array([question[2] for question in questions])[::step]
    low, high = mean_interval(np.array(kept["bits"])[::step], tokens)
    with tempfile.TemporaryDirectory() as folder:
        bits = run(QUICK, Path(folder), "curve")["curve"][-1]["held_bits"]
    arm, seed, fraction = QUICK
    was = kept["curve"][-1]["held_bits"]
    print(
        f"{arm}, seed {seed}, {fraction:.0%} of the data: held-out loss {bits:.3f} bits a token "
        f"on the {len(tokens)} questions of the curve; kept: {was:.3f} ({low:.3f} to {high:.3f})"
    )
    if not low <= bits <= high:
        sys.exit("this is not the result that was kept")


def main() -> None:
    """Run the cells that are missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", metavar="N", type=float, help="start no cell after so long")
    parser.add_argument("--quick", action="store_true", help="one small cell, compared")
    options = parser.parse_args()
    if options.quick:
        quick()
        return
    started = time.monotonic()
    wanted = cells(options.seeds)
    missing = [name for name in wanted if not file_of(name).exists()]
    for number, name in enumerate(missing):
        minutes = (time.monotonic() - started) / 60
        if options.minutes is not None and minutes > options.minutes:
            break
        print(f"cell {number + 1} of {len(missing)}: {name}", file=sys.stderr, flush=True)
        run(name, CELLS)
    done = {
        name: json.loads(file_of(name).read_text()) for name in wanted if file_of(name).exists()
    }
    text = report(done)
    DOCUMENT.write_text(HEAD + text + "\n")
    plot(done, DOCUMENT.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
