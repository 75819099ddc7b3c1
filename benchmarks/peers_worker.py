"""One language model in a process of its own, measured on demand; `peers.py` starts these.

    python benchmarks/peers_worker.py PEER MODEL_DIR GGUF WORK

Reads requests as lines of JSON on stdin and answers each with a line: {"do": "prefill", "ids"}
gives {"seconds"}; {"do": "decode", "ids", "count"} gives {"seconds", "ids"} of greedy decoding
after the prompt; {"do": "nll", "ids"} gives {"nats"}, the sum over all tokens but the first;
{"do": "rss"} gives {"mib"} and {"do": "load"} gives {"version"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tinyalign.runtime.threads import default_threads

Logits = NDArray[np.float32]


class Model(Protocol):
    """What a peer can do."""

    version: str

    def read(self, ids: Sequence[int]) -> Logits:
        """Forget everything, read a prompt, give the logits [V] of its last token."""

    def step(self, token: int) -> Logits:
        """Read one token more."""

    def every(self, ids: Sequence[int]) -> Logits:
        """Forget everything, read a text, give all logits [N, V]."""


class TinyAlignLm:
    """This runtime's language model, exported from the same weights once (int8, no adapter)."""

    def __init__(self, directory: Path, gguf: Path, work: Path) -> None:
        import onnxruntime

        from tinyalign.runtime.lm import LanguageModel
        from tinyalign.runtime.loading import open_session
        from tinyalign.runtime.manifest import read_manifest

        place = work / "lm"
        if not (place / "done").exists():
            _export_lm(gguf, place)
        spec = read_manifest(directory).lm
        table = np.memmap(place / "embeddings.bin", "<f2", "r", shape=(spec.vocab, spec.width))
        self._table = table
        session = open_session(place / "lm.onnx", default_threads(), spin=True)
        self._lm = LanguageModel(session, spec)
        self.version = f"onnxruntime {onnxruntime.__version__}"

    def read(self, ids: Sequence[int]) -> Logits:
        self._state = self._lm.new_state(len(ids) + 128)
        return self._lm.forward(self._state, self._rows(ids))[0]

    def step(self, token: int) -> Logits:
        return self._lm.forward(self._state, self._rows([token]))[0]

    def every(self, ids: Sequence[int]) -> Logits:
        return self._lm.forward(
            self._lm.new_state(len(ids)), self._rows(ids), tuple(range(len(ids)))
        )

    def _rows(self, ids: Sequence[int]) -> Logits:
        return self._table[list(ids)].astype(np.float32)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on the GGUF file or one quantized from it."""

    def __init__(self, gguf: Path, all_logits: bool = False) -> None:
        import llama_cpp

        self._make: Callable[[bool], Any] = lambda logits: llama_cpp.Llama(
            str(gguf), n_ctx=1024, n_batch=512, n_threads=default_threads(),
            n_threads_batch=default_threads(), logits_all=logits, verbose=False,
        )  # fmt: skip
        self._llama = self._make(False)
        self._lib = llama_cpp
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def read(self, ids: Sequence[int]) -> Logits:
        self._llama.reset()
        self._llama.eval(list(ids))
        return self._last()

    def step(self, token: int) -> Logits:
        self._llama.eval([token])
        return self._last()

    def every(self, ids: Sequence[int]) -> Logits:
        llama = self._make(True)
        llama.eval(list(ids))
        return np.array(llama.scores[: len(ids)], np.float32)

    def _last(self) -> Logits:
        pointer = self._lib.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),))


class Torch:
    """transformers in torch."""

    def __init__(self, gguf: Path, dtype: str) -> None:
        import torch

        from tinyalign.training.lm import load_lm

        torch.set_num_threads(default_threads())
        self._torch = torch
        self._lm = load_lm(gguf).to(getattr(torch, dtype)).eval()
        self.version = f"torch {torch.__version__}, transformers {version('transformers')}"

    def read(self, ids: Sequence[int]) -> Logits:
        return self._run(ids, None)

    def step(self, token: int) -> Logits:
        return self._run([token], self._cache)

    def _run(self, ids: Sequence[int], cache: Any) -> Logits:
        with self._torch.inference_mode():
            out = self._lm(
                self._torch.tensor([list(ids)]), past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        self._cache = out.past_key_values
        logits: Logits = out.logits[0, -1].float().numpy()
        return logits

    def every(self, ids: Sequence[int]) -> Logits:
        with self._torch.inference_mode():
            logits: Logits = self._lm(self._torch.tensor([list(ids)])).logits[0].float().numpy()
        return logits


class Optimum:
    """optimum's ORTModelForCausalLM, exported from the same weights once; fp32 or dynamic int8."""

    def __init__(self, gguf: Path, work: Path, int8: bool) -> None:
        from optimum.onnxruntime import ORTModelForCausalLM

        place = work / "optimum"
        if not (place / "model.onnx").exists():
            _export_optimum(gguf, place)
        name = "model.onnx"
        if int8:
            name = "model_quantized.onnx"
            if not (place / name).exists():
                _quantize_optimum(place)
        import onnxruntime
        import torch

        torch.set_num_threads(default_threads())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = default_threads()
        self._torch = torch
        self._lm = ORTModelForCausalLM.from_pretrained(
            place, file_name=name, session_options=options, use_cache=True
        )
        self.version = f"optimum {version('optimum')}, optimum-onnx {version('optimum-onnx')}"

    def read(self, ids: Sequence[int]) -> Logits:
        self._length, self._cache = 0, None
        return self._run(ids)[-1]

    def step(self, token: int) -> Logits:
        return self._run([token])[-1]

    def every(self, ids: Sequence[int]) -> Logits:
        self._length, self._cache = 0, None
        return self._run(ids)

    def _run(self, ids: Sequence[int]) -> Logits:
        torch = self._torch
        self._length += len(ids)
        out = self._lm(
            input_ids=torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, self._length, dtype=torch.long),
            position_ids=torch.arange(self._length - len(ids), self._length)[None],
            past_key_values=self._cache,
        )
        self._cache = out.past_key_values
        logits: Logits = np.asarray(out.logits[0], np.float32)
        return logits


class Genai:
    """onnxruntime-genai on the graph and the weights of this runtime (`_write_genai`)."""

    def __init__(self, directory: Path, gguf: Path, work: Path) -> None:
        import onnxruntime_genai as genai

        from tinyalign.runtime.manifest import read_manifest

        if not (work / "lm" / "done").exists():
            _export_lm(gguf, work / "lm")
        for name, every in (("genai", False), ("genai-every", True)):
            if not (work / name / "genai_config.json").exists():
                _write_genai(read_manifest(directory).lm, gguf, work / "lm", work / name, every)
        self._genai = genai
        self._model = genai.Model(str(work / "genai"))
        self._every = work / "genai-every"
        self.version = f"onnxruntime-genai {genai.__version__}"

    def read(self, ids: Sequence[int]) -> Logits:
        self._generator = self._start(self._model)
        return self._run(ids)[-1]

    def step(self, token: int) -> Logits:
        return self._run([token])[-1]

    def every(self, ids: Sequence[int]) -> Logits:
        generator = self._start(self._genai.Model(str(self._every)))
        generator.append_tokens(np.array([ids], np.int32))
        return np.asarray(generator.get_output("logits"))[0]

    def _start(self, model: Any) -> Any:
        parameters = self._genai.GeneratorParams(model)
        parameters.set_search_options(max_length=1024, do_sample=False, batch_size=1)
        return self._genai.Generator(model, parameters)

    def _run(self, ids: Sequence[int]) -> Logits:
        self._generator.append_tokens(np.array([ids], np.int32))
        return np.asarray(self._generator.get_logits())[0]


def _write_genai(spec: Any, gguf: Path, source: Path, place: Path, every: bool) -> None:
    """This runtime's graph as onnxruntime-genai wants it: the same operators and weights, behind
    some that look up the tokens' embeddings and count the attention mask.

    Logits are those of the last token, as here; or of every one, for quality.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from tinyalign.training.lm import load_lm

    place.mkdir(parents=True, exist_ok=True)
    for name in ("lm.onnx.data", "embeddings.bin"):
        (place / name).unlink(missing_ok=True)
        (place / name).hardlink_to(source / name)
    model = onnx.load(str(source / "lm.onnx"), load_external_data=False)
    graph = model.graph
    table = TensorProto(
        name="embeddings", data_type=TensorProto.FLOAT16, dims=(spec.vocab, spec.width),
        data_location=TensorProto.EXTERNAL,
    )  # fmt: skip
    size = 2 * spec.vocab * spec.width
    for key, value in (("location", "embeddings.bin"), ("offset", 0), ("length", size)):
        table.external_data.add(key=key, value=str(value))
    numbers = {"zero": 0, "one": 1, "last": -1}
    for name, number in numbers.items():
        graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), name))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "start"))
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "step"))
    graph.initializer.append(table)
    node = helper.make_node
    front = [
        node("Gather", ["embeddings", "input_ids"], ["embedded"]),
        node("Cast", ["embedded"], ["inputs_embeds"], to=TensorProto.FLOAT),
        node("ReduceSum", ["attention_mask", "one"], ["tokens"], keepdims=0),
        node("Sub", ["tokens", "one"], ["tokens_less_one"]),
        node("Cast", ["tokens_less_one"], ["seqlens_k"], to=TensorProto.INT32),
        node("Squeeze", ["tokens", "zero"], ["total"]),
        node("Cast", ["total"], ["total_sequence_length"], to=TensorProto.INT32),
        node("Shape", ["input_ids"], ["shape"]),
        node("Gather", ["shape", "step"], ["new"]),
        node("Range", ["start", "new", "step"], ["all_rows"]),
        node("Identity", ["all_rows" if every else "last"], ["logit_rows"]),
    ]
    nodes = [*front, *graph.node]
    inputs = [
        *(helper.make_tensor_value_info(name, TensorProto.INT64, [1, name])
          for name in ("input_ids", "attention_mask")),
        *(value for value in graph.input if value.name.startswith("past.")),
    ]  # fmt: skip
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    onnx.save_model(model, str(place / "model.onnx"))
    config = load_lm(gguf).config
    decoder = {
        "session_options": {"intra_op_num_threads": default_threads(), "provider_options": []},
        "filename": "model.onnx",
        "head_size": spec.head_dim,
        "hidden_size": spec.width,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past.%d.key",
            "past_value_names": "past.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    described = {
        "type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "context_length": spec.context, "vocab_size": spec.vocab, "decoder": decoder,
    }  # fmt: skip
    search = {"max_length": spec.context, "past_present_share_buffer": True}
    (place / "genai_config.json").write_text(json.dumps({"model": described, "search": search}))


def _export_lm(gguf: Path, place: Path) -> None:
    from tinyalign.export.lm import export_lm, write_embeddings
    from tinyalign.training.lm import load_lm

    place.mkdir(parents=True, exist_ok=True)
    model = load_lm(gguf)
    write_embeddings(model, place / "embeddings.bin")
    export_lm(model, place / "lm.onnx", "int8")
    (place / "done").touch()


def _export_optimum(gguf: Path, place: Path) -> None:
    import shutil
    import tempfile

    from optimum.exporters.onnx import main_export

    from tinyalign.training.lm import load_lm

    with tempfile.TemporaryDirectory() as folder:
        load_lm(gguf).save_pretrained(folder)
        main_export(folder, output=place, task="text-generation-with-past", no_post_process=False)
        shutil.copy(Path(folder) / "config.json", place / "config.json")


def _quantize_optimum(place: Path) -> None:
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(place, file_name="model.onnx")
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    quantizer.quantize(save_dir=place, quantization_config=config)


def quantized(gguf: Path, work: Path, kind: str) -> Path:
    """The GGUF file in another of llama.cpp's precisions, made once."""
    import llama_cpp

    target = work / f"{kind}.gguf"
    if not target.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        parameters.allow_requantize = True
        parameters.nthread = default_threads()
        temporary = target.with_suffix(".tmp")
        if llama_cpp.llama_model_quantize(str(gguf).encode(), str(temporary).encode(), parameters):
            raise RuntimeError(f"llama.cpp could not quantize to {kind}")
        temporary.replace(target)
    return target


def open_peer(name: str, directory: Path, gguf: Path, work: Path) -> Model:
    """The peer of that name."""
    if name == "tinyalign":
        return TinyAlignLm(directory, gguf, work)
    if name == "genai":
        return Genai(directory, gguf, work)
    family, _, kind = name.partition(" ")
    if family == "llama.cpp":
        return LlamaCpp(gguf if kind == "Q4_1" else quantized(gguf, work, kind))
    if family == "torch":
        return Torch(gguf, {"fp32": "float32", "bf16": "bfloat16"}[kind])
    return Optimum(gguf, work, kind == "int8")


def nats(logits: Logits, ids: Sequence[int]) -> float:
    """Summed negative log-likelihood of a text's tokens but the first."""
    rows = logits[:-1].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    chosen = rows[np.arange(len(rows)), list(ids[1:])]
    return float((np.log(np.exp(rows).sum(-1)) - chosen).sum())


def peak_mib() -> float:
    """Peak resident memory of this program. (ru_maxrss would count what started it, too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def answer(model: Model, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    kind = request["do"]
    if kind == "load":
        return {"version": model.version}
    if kind == "rss":
        return {"mib": peak_mib()}
    ids = request["ids"]
    if kind == "nll":
        return {"nats": nats(model.every(ids), ids)}
    started = time.perf_counter()
    logits = model.read(ids)
    token = int(logits.argmax())
    if kind == "prefill":
        return {"seconds": time.perf_counter() - started, "ids": [token]}
    told = [token]
    started = time.perf_counter()
    for _ in range(request["count"]):
        told.append(int(model.step(told[-1]).argmax()))
    return {"seconds": time.perf_counter() - started, "ids": told}


def main() -> None:
    """Answer until stdin ends."""
    name, directory, gguf, work = sys.argv[1], *map(Path, sys.argv[2:5])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    model = open_peer(name, directory, gguf, work)
    for line in sys.stdin:
        out.write(json.dumps(answer(model, json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
