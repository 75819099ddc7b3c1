"""Every family of language models, torch through export to the runtime, on tiny random models.

    python benchmarks/families.py            # the table in docs/models.md, results/families.json
    python benchmarks/families.py --large    # the cost of exporting a random Qwen2 of 0.5 B

A tiny model shows that a graph computes what transformers computes: the same operators in the same
order, at sizes where a prompt is longer than the sliding window. Its weights are drawn so large
that every layer moves the logits.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tinyalign.export.graph import Precision
from tinyalign.export.lm import (
    EMBEDDINGS_NAME,
    export_lm,
    lm_spec,
    write_embeddings,
)
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.loading import open_session
from tinyalign.training.lm import round_embeddings

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "benchmarks/results/families.json", ROOT / "docs/models.md"
VOCAB, PROMPT, STEPS, CONTEXT = 200, 40, 32, 96
Floats = NDArray[np.float32]

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG_ROPE = {"type": "longrope", "short_factor": [1.1] * 8, "long_factor": [4.0] * 8}
LINEAR_ROPE = {"rope_type": "linear", "factor": 8.0}
GEMMA = {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 24}
QWEN_0_5B = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A tiny model: its name, its class in transformers, how its config differs from `SMALL`."""

    name: str
    model: str
    options: dict[str, Any]
    published: str  # models of that kind


FAMILIES = (
    Family("llama", "Llama", {"rope_theta": 5e4}, "TinyLlama"),
    Family("llama, tied", "Llama", {"tie_word_embeddings": True}, "SmolLM2"),
    Family("llama, rope `llama3`, biases", "Llama",
           {"rope_scaling": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}, "Llama 3.2"),
    Family("qwen2", "Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}, "Qwen2, Qwen2.5"),
    Family("qwen2, sliding window", "Qwen2",
           {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, ""),
    Family("qwen3", "Qwen3", {"tie_word_embeddings": True, "head_dim": 32}, "Qwen3"),
    Family("phi", "Phi", {"num_key_value_heads": 4, "hidden_size": 128}, "Phi-1.5, Phi-2"),
    Family("phi3", "Phi3", {}, "Phi-3"),
    Family("phi3, rope `longrope`, sliding window", "Phi3",
           {"sliding_window": 16, "rope_scaling": LONG_ROPE, "max_position_embeddings": 4 * CONTEXT,
            "original_max_position_embeddings": CONTEXT}, "Phi-3 (128k), Phi-3.5"),
    Family("phi3, part of a head turned", "Phi3",
           {"partial_rotary_factor": 0.5, "hidden_size": 128}, "Phi-4-mini"),
    Family("gemma2", "Gemma2",
           {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}, "Gemma 2"),
    Family("gemma3_text", "Gemma3Text",
           {**GEMMA, "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_scaling": LINEAR_ROPE},
           "Gemma 3"),
    Family("opt", "OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "OPT"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What became of a family's tiny model."""

    family: str
    published: str
    exported: bool
    parity_error: float  # greatest difference of a logit over the prompt, fp32
    greedy_equal: bool  # all 32 tokens after it, fp32
    fused_attention: bool  # one operator for the attention of every layer
    int8_error: float  # root mean square difference of the logits, by their standard deviation


def tiny_model(family: Family) -> PreTrainedModel:
    """A random model of a family, each of whose layers matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.model}Config")(**SMALL | family.options)
    config._attn_implementation = "eager"  # transformers' fast attention leaves out soft caps
    kind = family.model.removesuffix("Text")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).requires_grad_(False).eval()
    gemma = "gemma" in config.model_type  # its norms hold the scale less 1
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(weight, *((-0.5, 0.5) if gemma else (0.5, 1.5)))
        else:  # Gemma multiplies its embeddings by 8
            torch.nn.init.normal_(weight, std=0.06 if gemma and "embed" in name else 0.15)
    round_embeddings(model)
    return model


def exported(model: PreTrainedModel, folder: Path, precision: Precision) -> LanguageModel:
    """The runtime's language model for an export of `model` into a folder."""
    write_embeddings(model, folder / EMBEDDINGS_NAME)
    export_lm(model, folder / "lm.onnx", precision, CONTEXT)
    return LanguageModel(open_session(folder / "lm.onnx", 1), lm_spec(model.config, CONTEXT))


def table_of(folder: Path, model: PreTrainedModel) -> Floats:
    """The rows that the runtime feeds, [V, D]."""
    half = np.fromfile(folder / EMBEDDINGS_NAME, "<f2")
    return half.reshape(model.config.vocab_size, -1).astype(np.float32)


def prompt(length: int = PROMPT, seed: int = 0) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def torch_logits(model: PreTrainedModel, ids: list[int]) -> Floats:
    """Logits [N, V] of transformers."""
    with torch.inference_mode():
        logits: Floats = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def torch_greedy(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """The likeliest next tokens, each from all tokens before it, without a cache."""
    ids = list(ids)
    for _ in range(STEPS):
        ids.append(int(torch_logits(model, ids)[-1].argmax()))
    return ids


def runtime_greedy(lm: LanguageModel, table: Floats, ids: list[int]) -> list[int]:
    """The likeliest next tokens, the prompt read at once and each of them after it."""
    ids, state = list(ids), lm.new_state(CONTEXT)
    logits = lm.forward(state, table[ids])
    for _ in range(STEPS):
        ids.append(int(logits[-1].argmax()))
        logits = lm.forward(state, table[ids[-1:]])
    return ids


def is_fused(path: Path, layers: int) -> bool:
    """Whether every layer's attention is one operator, and no other part of one is there."""
    ops = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    return ops.count("GroupQueryAttention") == layers and "Softmax" not in ops


def measure(family: Family) -> Row:
    """A family through export and runtime."""
    model, ids = tiny_model(family), prompt()
    expected, rows = torch_logits(model, ids), tuple(range(PROMPT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lm = exported(model, folder, "fp32")
        table = table_of(folder, model)
        error = np.abs(lm.forward(lm.new_state(CONTEXT), table[ids], rows) - expected).max()
        equal = runtime_greedy(lm, table, ids) == torch_greedy(model, ids)
        fused = is_fused(folder / "lm.onnx", model.config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as name:
        lm = exported(model, Path(name), "int8")
        rounded = lm.forward(lm.new_state(CONTEXT), table[ids], rows)
    loss = np.sqrt(np.square(rounded - expected).mean()) / expected.std()
    return Row(family.name, family.published, True, float(error), equal, fused, float(loss))


def measure_large(precision: Precision) -> dict[str, Any]:
    """Seconds, peak memory and size of exporting a random Qwen2 of 0.5 B."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN_0_5B)).eval()
    before = peak_memory()
    with tempfile.TemporaryDirectory() as name:
        start, worked = time.perf_counter(), time.process_time()
        write_embeddings(model, Path(name) / EMBEDDINGS_NAME)
        export_lm(model, Path(name) / "lm.onnx", precision)
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        size = sum(path.stat().st_size for path in Path(name).iterdir())
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "precision": precision,
        "seconds": round(seconds, 1),
        "processor_seconds": round(worked, 1),
        "model_gb": round(before / 1e9, 2),
        "peak_gb": round(peak_memory() / 1e9, 2),
        "size_gb": round(size / 1e9, 3),
    }


def peak_memory() -> int:
    """The most bytes that this process has held so far (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table_text(rows: list[Row]) -> str:
    """The results as a markdown table."""
    lines = [
        "| family | as in | exported | parity error | greedy 32 equal | fused attention | int8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name, *rest = row.family.split(", ", 1)
        lines.append(
            f"| {', '.join([f'`{name}`', *rest])} | {row.published} | {yes(row.exported)} "
            f"| {row.parity_error:.1e} | {yes(row.greedy_equal)} | {yes(row.fused_attention)} "
            f"| {row.int8_error:.3f} |"
        )
    return "\n".join(lines)


def large_text(large: dict[str, Any]) -> str:
    """The cost of a large export as a sentence."""
    return (
        f"A random Qwen2 of {large['parameters'] / 1e6:.0f} M parameters (24 layers, 896 wide, "
        f"vocabulary 151,936) in {large['precision']}: {large['seconds']:.0f} s on two cores ("
        f"{large['processor_seconds']:.0f} s of a processor's time),\n"
        f"at most {large['peak_gb']:.1f} GB of memory ({large['model_gb']:.1f} GB of them the "
        f"model in float32 and Python's libraries),\n{large['size_gb']:.2f} GB on the disk."
    )


def yes(value: bool) -> str:
    """A truth in a table."""
    return "yes" if value else "**no**"


def write_between(document: Path, name: str, text: str) -> None:
    """Replace what stands between a document's markers `<!-- name -->` and `<!-- end -->`."""
    old = document.read_text(encoding="utf-8")
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    new, count = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{document} has no place for {name}")
    document.write_text(new, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large", action="store_true", help="only the large export")
    options = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.large:
        results["large"] = measure_large("int8")
        write_between(DOCUMENT, "large", large_text(results["large"]))
        print(large_text(results["large"]))
    else:
        rows = [measure(family) for family in FAMILIES]
        results["families"] = [asdict(row) for row in rows]
        write_between(DOCUMENT, "families", table_text(rows))
        print(table_text(rows))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
