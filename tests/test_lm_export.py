"""lm.onnx computes what the torch Llama computes, with and without cache, at every precision."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from tinyalign.export.graph import Precision
from tinyalign.export.lm import export_lm, write_embeddings
from tinyalign.export.quantize import BLOCK, Bits, dequantize, quantize

CAPACITY = 64
Logits = NDArray[np.float32]


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_theta=50000.0,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.12)
    embeddings = model.model.embed_tokens.weight
    embeddings.data = embeddings.data.half().float()
    return model


class Cached:
    """lm.onnx with one buffer for past and present of each cache part."""

    def __init__(self, path: Path, model: LlamaForCausalLM) -> None:
        config = model.config
        self.embeddings = model.model.embed_tokens.weight.numpy()
        self.session = ort.InferenceSession(path)
        self.binding = self.session.io_binding()
        self.length = 0
        shape = (1, config.num_key_value_heads, CAPACITY, config.head_dim)
        for i in range(config.num_hidden_layers):
            for part in ("key", "value"):
                # what is not yet written must not matter
                buffer = ort.OrtValue.ortvalue_from_numpy(np.full(shape, 7.0, np.float32))
                self.binding.bind_ortvalue_input(f"past.{i}.{part}", buffer)
                self.binding.bind_ortvalue_output(f"present.{i}.{part}", buffer)

    def run(self, ids: list[int], rows: list[int]) -> Logits:
        """Append ids; logits [R, V] of the given rows."""
        self.length += len(ids)
        inputs = {
            "inputs_embeds": self.embeddings[ids][None],
            "seqlens_k": np.array([self.length - 1], np.int32),
            "total_sequence_length": np.array(self.length, np.int32),
            "logit_rows": np.array(rows, np.int64),
        }
        for name, value in inputs.items():
            self.binding.bind_cpu_input(name, value)
        shape = (1, len(rows), self.embeddings.shape[0])
        logits = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
        self.binding.bind_ortvalue_output("logits", logits)
        self.session.run_with_iobinding(self.binding)
        result: Logits = logits.numpy()[0].copy()
        return result


def torch_logits(model: LlamaForCausalLM, ids: list[int]) -> Logits:
    with torch.inference_mode():
        result: Logits = model(torch.tensor([ids])).logits[0].numpy()
    return result


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, length).tolist()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def folder(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    write_embeddings(llama, folder / "embeddings.bin")
    for precision in ("fp32", "int8", "int4"):
        export_lm(llama, folder / f"{precision}.onnx", precision, context=CAPACITY)
    return folder


@pytest.fixture
def cached(llama: LlamaForCausalLM, folder: Path) -> Cached:
    return Cached(folder / "fp32.onnx", llama)


def test_logits_of_all_rows(llama: LlamaForCausalLM, cached: Cached) -> None:
    ids = prompt(20)
    assert np.abs(cached.run(ids, list(range(20))) - torch_logits(llama, ids)).max() <= 1e-4


@pytest.mark.parametrize("rows", [[0], [19], [3, 7, 19], [19, 0, 0]])
def test_logits_of_some_rows(llama: LlamaForCausalLM, cached: Cached, rows: list[int]) -> None:
    ids = prompt(20)
    assert np.abs(cached.run(ids, rows) - torch_logits(llama, ids)[rows]).max() <= 1e-4


def test_greedy_tokens(llama: LlamaForCausalLM, cached: Cached) -> None:
    ids = prompt(9)
    expected = list(ids)
    for _ in range(32):
        expected.append(int(torch_logits(llama, expected)[-1].argmax()))
    logits = cached.run(ids, [len(ids) - 1])
    for _ in range(32):
        ids.append(int(logits[0].argmax()))
        logits = cached.run(ids[-1:], [0])
    assert ids == expected


@pytest.mark.parametrize("cuts", [[1, 2, 3], [7], [5, 12, 13], [15]])
def test_cached_equals_uncached(
    llama: LlamaForCausalLM, folder: Path, cached: Cached, cuts: list[int]
) -> None:
    ids = prompt(16)
    whole = Cached(folder / "fp32.onnx", llama).run(ids, list(range(16)))
    pieces = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, 16], strict=True)]
    parts = [cached.run(piece, list(range(len(piece)))) for piece in pieces]
    assert np.abs(np.concatenate(parts) - whole).max() <= 1e-5


def test_a_shorter_cache_is_a_rollback(cached: Cached) -> None:
    ids, other = prompt(12), prompt(6, seed=1)
    first = cached.run(ids, [11])
    cached.length = 8
    cached.run(other, [5])
    cached.length = 8
    assert np.abs(cached.run(ids[8:], [3]) - first).max() <= 1e-5


def test_head_of_its_own(tmp_path: Path) -> None:
    model = tiny_llama(tied=False)
    export_lm(model, tmp_path / "lm.onnx", "fp32", context=CAPACITY)
    ids = prompt(10)
    difference = Cached(tmp_path / "lm.onnx", model).run(ids, [9]) - torch_logits(model, ids)[9:]
    assert np.abs(difference).max() <= 1e-4


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_quantized_differs_only_by_rounding(
    llama: LlamaForCausalLM, folder: Path, precision: Precision, bits: Bits
) -> None:
    """Close to torch with the weights the blocks stand for; activations are rounded to int8."""
    rounded = copy.deepcopy(llama)
    rounded.lm_head.weight = torch.nn.Parameter(llama.lm_head.weight.clone(), requires_grad=False)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear):
            blocks = quantize(module.weight.numpy(), 8 if name == "lm_head" else bits)
            module.weight.copy_(torch.from_numpy(dequantize(blocks)))
    ids = prompt(40)
    expected = torch_logits(rounded, ids)
    difference = Cached(folder / f"{precision}.onnx", llama).run(ids, list(range(40))) - expected
    assert np.sqrt(np.square(difference).mean()) <= 0.05 * expected.std()


def test_files_are_small(folder: Path) -> None:
    sizes = [(folder / f"{p}.onnx.data").stat().st_size for p in ("fp32", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)


def test_same_bytes_every_time(llama: LlamaForCausalLM, folder: Path, tmp_path: Path) -> None:
    export_lm(llama, tmp_path / "int8.onnx", "int8", context=CAPACITY)
    for name in ("int8.onnx", "int8.onnx.data"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [BLOCK, 3 * BLOCK, 50])
def test_blocks_stand_for_the_weight(bits: Bits, columns: int) -> None:
    weight = np.random.default_rng(0).normal(size=(5, columns)).astype(np.float32)
    weight[1] = 0  # a block without any range
    weight[2] = np.abs(weight[2]) + 3  # all on one side
    restored = dequantize(quantize(weight, bits))
    assert restored.shape == weight.shape
    assert np.array_equal(restored[1], weight[1])
    step = 2 * np.abs(weight).max() / (2**bits - 2)
    assert np.abs(restored - weight).max() <= (0.51 if bits == 8 else 2.0) * step
