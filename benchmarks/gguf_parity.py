"""Does the dequantized language model write what its GGUF file writes under llama.cpp?

    python benchmarks/gguf_parity.py SmolLM2-135M-Instruct.Q4_1.gguf [--json]

Needs `pip install llama-cpp-python` (it compiles). Every prompt is tokenized by both sides, then
continued greedily by both. llama.cpp rounds activations to 8 bits before multiplying with 4-bit
weights, torch does not; so where the two best tokens are nearly equal the texts may part. Hence
two runs of llama.cpp: on the file as it is, and on a copy that llama.cpp itself dequantized to
float32, where nothing is rounded. And two measures: equal texts, and for each step of llama.cpp's
text whether torch, given the same text so far, would have chosen the same token (and by how much
it would rather have had another).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp
import torch
from llama_cpp import Llama
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tinyalign.training.lm import load_lm, load_tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "What is 12 + 30?",
    "Write one sentence about a red bicycle.",
    "What colour do you get from blue and yellow?",
    "Translate to French: The cat sleeps — déjà vu 🎉.",
    "Is a whale a fish? Answer yes or no and say why.",
    "Finish the story: Once upon a time there was a small robot",
)
PROMPT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Parity:
    """How one prompt went. `worst_gap`: torch's best logit minus that of llama.cpp's token."""

    question: str
    text: str
    equal_prompt_ids: bool
    equal_text: bool
    tokens: int
    same_choice: int
    worst_gap: float


def open_peer(path: Path) -> Llama:
    """A GGUF file in llama.cpp."""
    return Llama(str(path), n_ctx=512, n_threads=torch.get_num_threads(), verbose=False)


def dequantize_by_llama_cpp(source: Path, target: Path) -> None:
    """Write a float32 copy of a GGUF file with llama.cpp's own code."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
    options.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise RuntimeError(f"llama.cpp could not dequantize {source}")


def continue_llama_cpp(model: Llama, prompt_ids: list[int], limit: int, stop: int) -> list[int]:
    """Greedy continuation by llama.cpp, up to `limit` ids, without the stop id."""
    model.reset()
    ids: list[int] = []
    for token in model.generate(prompt_ids, temp=0.0, repeat_penalty=1.0):
        if token == stop or len(ids) == limit:
            break
        ids.append(token)
    return ids


def continue_torch(model: LlamaForCausalLM, prompt_ids: list[int], limit: int) -> list[int]:
    """Greedy continuation by torch, up to `limit` ids, without the stop id."""
    prompt = torch.tensor([prompt_ids])  # [1, N]
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    ids: list[int] = output[0, len(prompt_ids) :].tolist()
    return ids[:-1] if ids[-1] == model.config.eos_token_id else ids


def compare(
    question: str, lm: LlamaForCausalLM, tokenizer: Tokenizer, peer: Llama, limit: int
) -> Parity:
    """Continue one question on both sides."""
    prompt = PROMPT.format(question=question)
    prompt_ids = tokenizer.encode(prompt).ids
    peer_prompt_ids = peer.tokenize(prompt.encode(), add_bos=False, special=True)
    peer_ids = continue_llama_cpp(peer, prompt_ids, limit, lm.config.eos_token_id)
    own_ids = continue_torch(lm, prompt_ids, limit)
    with torch.inference_mode():
        logits = lm(torch.tensor([prompt_ids + peer_ids])).logits[0]  # [N, V]
    steps = logits[len(prompt_ids) - 1 : -1]  # [tokens, V]
    chosen = steps.gather(1, torch.tensor(peer_ids)[:, None])[:, 0]
    gaps = steps.max(dim=1).values - chosen  # [tokens], 0 where the choice is the same
    return Parity(
        question=question,
        text=tokenizer.decode(own_ids),
        equal_prompt_ids=prompt_ids == peer_prompt_ids,
        equal_text=own_ids == peer_ids,
        tokens=len(peer_ids),
        same_choice=int((gaps == 0).sum()),
        worst_gap=float(gaps.max()),
    )


def print_table(results: list[Parity]) -> None:
    """One line a prompt, then the sums."""
    print("prompt ids  text   same choice  worst gap  question")
    for r in results:
        ids, text = ("equal" if flag else "DIFFER" for flag in (r.equal_prompt_ids, r.equal_text))
        choice = f"{r.same_choice}/{r.tokens}"
        print(f"{ids:10}  {text:6} {choice:>11}  {r.worst_gap:9.3f}  {r.question}")
    same, tokens = sum(r.same_choice for r in results), sum(r.tokens for r in results)
    texts = sum(r.equal_text for r in results)
    print(f"{texts} of {len(results)} texts equal, {same} of {tokens} choices equal")


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("--tokens", type=int, default=40, help="longest continuation (default 40)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args(arguments)
    lm, tokenizer = load_lm(options.gguf), load_tokenizer(options.gguf)
    report: dict[str, list[Parity]] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "float32.gguf"
        dequantize_by_llama_cpp(options.gguf, copy)
        for name, path in (("as it is", options.gguf), ("dequantized by llama.cpp", copy)):
            peer = open_peer(path)
            report[name] = [compare(q, lm, tokenizer, peer, options.tokens) for q in QUESTIONS]
            if not options.json:
                print(f"llama.cpp on the file {name}:")
                print_table(report[name])
    if options.json:
        plain = {name: [asdict(result) for result in results] for name, results in report.items()}
        print(json.dumps(plain, ensure_ascii=False, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
