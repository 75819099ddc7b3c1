"""Write docs/model-card.md: what the default model is, can and cannot do, from the results kept.

    python benchmarks/model_card.py

Numbers come from benchmarks/results/ (each says with which command it was measured) and from the
weights' recipe; nothing is measured here.
"""

# ruff: noqa: E501 - the text is a document
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chain
from common import markdown, note
from safetensors.numpy import load_file

from tinyalign.runtime.keys import load_key_arrays
from tinyalign.training.parts import DEFAULT_WEIGHTS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("connector", "compressor", "rag_connector")
CARD = ROOT / "docs" / "model-card.md"

TEXT = """\
# Model card: the default model

Written by `python benchmarks/model_card.py` from the results in `benchmarks/results/`; brackets hold 95 %
intervals.

## What it is

A vision-language model of 141 million parameters that answers short questions about a picture on a CPU, and
rests its answers on a memory bank that anyone can add to without training (TinyAlign, arXiv 2505.12884).

| part | what | parameters | licence |
| --- | --- | ---: | --- |
| vision encoder | EfficientNet-Lite2, trained by others on ImageNet-1k, frozen | 6.1 M | Apache-2.0 |
| language model | SmolLM2-135M-Instruct, trained by others, with a LoRA adapter of this project merged | 134.5 M + 3.9 M | Apache-2.0 |
| connector, compressor, RAG connector, key head | trained here | {trained} M | the project's |

Trained on openly licensed pictures and on class prototypes of the encoder: [data-card.md](data-card.md). Recipe:
`training/recipe.py`; `make train` runs all of it (about two hours on two cores; these weights were trained on a GPU in
seven minutes).

## How it is asked

```
{prompt}
```

In angle brackets: image tokens, memories, the question. Up to {top_k} memories, nearest first; none below the
bank's score floor or more than {margin} behind the best. Answers are short English sentences, decoded greedily; what no
memory tells is to be answered with "I do not know."

## What it can do

No picture asked about was trained on or is in the default bank, nor was any of its concept, except that
easy-vqa's test pictures show shapes and colours that its training pictures show too (`python
benchmarks/accuracy.py`).

{looks}

{names}

What it was taught by one example, without training, asked on another view (`python benchmarks/teach.py`,
[memory-bank.md](memory-bank.md)):

{teach}

## Where accuracy is lost

`python benchmarks/chain.py` follows questions link by link: what a linear probe reads off the encoder's features, whether
the image token of that slot says it, the torch model's answer, and the exported model's:

{chain}

The exported, quantized model answers as torch does. Answers follow the image token where it is right; the image tokens are
near what can be read off the features. So colour, number and place in scenes are bound by the encoder's ten cells: finer
features are the next step. For photographs the bound is the encoder's own best class, for what was taught it is retrieval.

## What it cannot do

- **Name what it never saw and was never told.** Outside the encoder's 1,000 classes and what is in the bank it guesses
  something that looks alike. Teach it.
- **Read text, count above five, tell left from right reliably, or describe a scene of many things.** It sees one
  picture as {tokens} tokens.
- **Hold a conversation, reason or calculate.** Every question stands alone; the language model is very small.
- **Faces, people, medical or safety questions**: not trained for, not checked, do not use it for them.
- **Other languages than English.**
- Colour words of what is shaded are noisy (see the data card), and so are answers about colours.
- A memory is believed. What somebody writes into the bank is answered as if it were so; the answer says which memory it
  rests on.
- Without a near memory it may still be fooled by a memory of something alike; the more rivals a bank has that tell the
  same kind of fact, the more often (see the table above).
"""


def load(name: str) -> Any:
    """A results file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def shown(value: dict[str, Any]) -> str:
    """A share with its interval."""
    return f"{value['share']:.2f} ({value['low']:.2f}–{value['high']:.2f})"


def looks_table(accuracy: dict[str, Any]) -> str:
    """Questions on looks with and without memory."""
    looks = accuracy["looks"]
    rows = [["held-out questions", "n", "with memory", "without"], ["---", *["---:"] * 3]]
    for key in looks:
        if key.endswith(", with memory"):
            group = key.removesuffix(", with memory")
            with_, without = looks[key], looks[f"{group}, without"]
            rows.append([group, str(with_["n"]), shown(with_), shown(without)])
    return "\n".join(markdown(rows))


def names_table(accuracy: dict[str, Any]) -> str:
    """Naming, with the plain copy of the nearest memory and the encoder's bound."""
    rows = [
        [
            "naming",
            "n",
            "with memory",
            "without",
            "copy of the nearest memory",
            "encoder's best class",
        ],
        ["---", *["---:"] * 5],
    ]
    for label, key in (
        ("photographs of the encoder's classes", "photos"),
        ("cut-outs of concepts nobody told it", "held-out cut-outs"),
    ):
        table = accuracy[key]
        cells = [table[f"{how}, strict"] for how in ("with memory", "without memory", "kNN copy")]
        bound = table.get("encoder top-1, strict")
        last = shown(bound) if bound else ""
        rows.append([label, str(cells[0]["n"]), *map(shown, cells), last])
    return "\n".join(markdown(rows))


def teach_table(teach: dict[str, Any]) -> str:
    """Accuracy by the number of other memories, of the newest run in the model's own mode."""
    run = [r for r in teach.values() if r["mode"] is None][-1]
    head = ["other memories", "name", "fact", "fact of a new kind", "“I do not know.”"]
    rows = [head, ["---:"] * len(head)]
    for name, condition in run["conditions"].items():
        if name not in ("before", "elsewhere"):
            cells = [condition["right"][key] for key in ("name", "fact", "unseen", "untold")]
            rows.append([f"{condition['memories']:,}", *map(shown, cells)])
    return "\n".join(markdown(rows))


def trained_numbers() -> int:
    """How many numbers were trained here, the adapter left out."""
    files = [DEFAULT_WEIGHTS / f"{part}.safetensors" for part in PARTS]
    counts = [
        value.size
        for file in files
        for name, value in load_file(file).items()
        if name not in ("vocabulary_ids", "class_names") and not name.endswith(" scale")
    ]
    return sum(counts) + load_key_arrays(DEFAULT_WEIGHTS / "key.npz").image_projection.size


def main() -> None:
    """Write the card."""
    recipe = json.loads((DEFAULT_WEIGHTS / "recipe.json").read_text())
    prompt, accuracy = recipe["prompt"], load("accuracy")
    frame = "".join(p if isinstance(p, str) else f"<{p}>" for p in prompt["image"])
    text = prompt["system"] + frame + prompt["memory"] + "<memory>" + prompt["question"]
    CARD.write_text(
        TEXT.format(
            trained=f"{trained_numbers() / 1e6:.1f}",
            prompt=text.replace("{question}", "<question>").strip(),
            top_k=prompt["top_k"], margin=prompt["margin"],
            looks=looks_table(accuracy), names=names_table(accuracy), teach=teach_table(load("teach")),
            chain=chain.table(load("chain")),
            tokens=sum(p for p in prompt["image"] if isinstance(p, int)),
        )
    )  # fmt: skip
    note(f"written: {CARD.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
