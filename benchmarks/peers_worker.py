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
