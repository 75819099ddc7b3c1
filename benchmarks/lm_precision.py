"""What the language model loses and gains in fp32, int8 and int4: quality, speed and size.

    python benchmarks/lm_precision.py SmolLM2-135M-Instruct.Q4_1.gguf [--text FILE] [--json]

Quality is measured against the float32 model in torch, on windows of 512 tokens of a text (by
default the English of some modules of Python's own library): perplexity, mean KL divergence in
nats, and how often the likeliest next token is the same. Speed is that of this machine, with the
runtime's own sessions and cache: the median of five runs, reading 256 tokens, writing 32 after 128.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from tinyalign.export.graph import Precision
from tinyalign.export.lm import export_lm, lm_spec, write_embeddings
from tinyalign.export.quality import MODULES, log_softmax
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.loading import open_session
from tinyalign.training.lm import load_lm, load_tokenizer

WINDOW = 512
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One precision's results; speeds in tokens per second, size in MB."""

    precision: str
    perplexity: float
    kl: float
    same_choice: float
    prefill: float
    decode: float
    load_s: float
    size_mb: float


def perplexity(log_probabilities: Floats, windows: list[list[int]]) -> float:
    """Of windows [w, N] under log probabilities [w, N, V]."""
    targets = np.array(windows)[:, 1:, None]  # [w, N - 1, 1]
    chosen = np.take_along_axis(log_probabilities[:, :-1], targets, axis=-1)
    return float(np.exp(-chosen.mean()))


def measure(
    precision: Precision, folder: Path, lm: LanguageModel, embeddings: Floats, load_s: float,
    windows: list[list[int]], reference: Floats,
) -> Row:  # fmt: skip
    """Quality and speed of one exported graph."""
    rows = tuple(range(WINDOW))
    logits = [lm.forward(lm.new_state(WINDOW), embeddings[ids], rows) for ids in windows]
    found = log_softmax(np.stack(logits))
    read, write = [], []
    for _ in range(5):
        start = time.perf_counter()
        lm.forward(lm.new_state(256), embeddings[windows[0][:256]])
        read.append(256 / (time.perf_counter() - start))
        state = lm.new_state(192)
        lm.forward(state, embeddings[windows[0][:128]])
        start = time.perf_counter()
        for token in windows[0][128:160]:
            lm.forward(state, embeddings[token : token + 1])
        write.append(32 / (time.perf_counter() - start))
    return Row(
        precision=precision,
        perplexity=perplexity(found, windows),
        kl=float((np.exp(reference) * (reference - found)).sum(axis=-1).mean()),
        same_choice=float((reference.argmax(-1) == found.argmax(-1)).mean()),
        prefill=statistics.median(read),
        decode=statistics.median(write),
        load_s=load_s,
        size_mb=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("--text", type=Path, help="text file to measure quality on")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens (default 4)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = load_lm(options.gguf), load_tokenizer(options.gguf)
    docs = [importlib.import_module(name).__doc__ or "" for name in MODULES]
    text = options.text.read_text() if options.text else "\n".join(docs)
    ids = tokenizer.encode(text).ids[: options.windows * WINDOW]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    with torch.inference_mode():
        logits = [model(torch.tensor([window])).logits[0].numpy() for window in windows]
    reference = log_softmax(np.stack(logits))
    table = []
    for precision in get_args(Precision):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_embeddings(model, folder / "embeddings.bin")
            export_lm(model, folder / "lm.onnx", precision)
            start = time.perf_counter()
            session = open_session(folder / "lm.onnx", options.threads)
            load_s = time.perf_counter() - start
            lm = LanguageModel(session, lm_spec(model.config, 2048))
            embeddings = model.model.embed_tokens.weight.numpy()
            table.append(measure(precision, folder, lm, embeddings, load_s, windows, reference))
    if options.json:
        print(json.dumps([asdict(row) for row in table], indent=2))
        return 0
    print(f"torch fp32: perplexity {perplexity(reference, windows):.2f} ({len(ids)} tokens)")
    print(
        "| weights | perplexity | KL | same choice | prefill tok/s | decode tok/s | load | size |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in table:
        print(
            f"| {r.precision} | {r.perplexity:.2f} | {r.kl:.4f} | {r.same_choice:.3f} "
            f"| {r.prefill:.0f} | {r.decode:.0f} | {r.load_s:.2f} s | {r.size_mb:.0f} MB |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
