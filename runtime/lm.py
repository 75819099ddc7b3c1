"""The language model's graph with its key/value cache.

The cache of a conversation is an explicit value, :class:`LmState`: one buffer per layer for keys
and one for values, f32 [1, kv_heads, capacity, head_dim]. Each is bound as ``past`` and as
``present`` of the graph at once, so a step writes its one row in place and copies nothing. The
session itself holds no state, so any number of threads may run it, each with a state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tinyalign.runtime.errors import ModelError, TinyAlignError
from tinyalign.runtime.manifest import LmSpec

Floats: TypeAlias = NDArray[np.float32]
KEPT = 16  # bindings of so many tokens at most are used again; rows of logits at most in a buffer
CAPACITY_STEP = 64  # buffers come in multiples of this many tokens


@dataclass
class LmState:
    """What the language model has read so far: ``length`` tokens of at most ``capacity``."""

    capacity: int
    buffers: dict[str, ort.OrtValue]  # "0.key", "0.value", "1.key", ...
    read: Floats  # [capacity, D], the embeddings of what was read
    logits: Floats  # [1, KEPT, V], of the last run
    length: int = 0
    # Bindings to use again, by number of tokens and of rows of logits.
    runs: dict[tuple[int, int], _Run] = field(default_factory=dict, repr=False)

    def keep_common(self, rows: Floats) -> int:
        """Forget all that is not the beginning of ``rows`` [N, D]; returns how many are kept.

        Two rows at least are left to be read, as every run reads two or more (`decode.py`).
        """
        count = max(0, min(self.length, len(rows) - 2))
        same = (self.read[:count] == rows[:count]).all(axis=1)
        self.length = max(0, count if same.all() else int(same.argmin()))
        return self.length


@dataclass
class _Run:
    """Inputs and outputs of one graph run, in memory that the binding points to."""

    binding: ort.IOBinding
    embeddings: Floats  # [1, N, D]
    rows: NDArray[np.int64]  # [R]
    last: NDArray[np.int32]  # [1], number of tokens in the cache after the run, less one
    total: NDArray[np.int32]  # scalar, number of tokens in the cache after the run
    logits: Floats  # [1, R, V]


class LanguageModel:
    """Runs ``lm.onnx``; safe to share between threads."""

    def __init__(self, session: ort.InferenceSession, spec: LmSpec) -> None:
        expected = {"inputs_embeds", "seqlens_k", "total_sequence_length", "logit_rows"}
        expected |= {f"past.{name}" for name in _buffer_names(spec)}
        if {node.name for node in session.get_inputs()} != expected:
            raise ModelError("lm.onnx has other inputs than its manifest says")
        self.session = session
        self._spec = spec
        # Any other provider may copy an input when it is bound, and never see it change.
        self._bind_anew = session.get_providers()[0] != "CPUExecutionProvider"

    def new_state(self, tokens: int) -> LmState:
        """An empty cache with room for ``tokens`` tokens, rounded up to a multiple of 64."""
        spec = self._spec
        capacity = min(spec.context, -(-tokens // CAPACITY_STEP) * CAPACITY_STEP)
        shape = (1, spec.kv_heads, capacity, spec.head_dim)
        names = _buffer_names(spec)
        buffers = {name: _value(np.zeros(shape, np.float32)) for name in names}
        read = np.zeros((capacity, spec.width), np.float32)
        return LmState(capacity, buffers, read, np.empty((1, KEPT, spec.vocab), np.float32))

    def forward(self, state: LmState, embeddings: Floats, rows: tuple[int, ...] = (-1,)) -> Floats:
        """Read ``embeddings`` [N, D] after what ``state`` holds; logits [R, V] of the given rows.

        Up to 16 rows of logits stay valid only until the next call with the same state.
        """
        count = len(embeddings)
        if state.length + count > state.capacity:
            raise TinyAlignError(
                f"{state.length + count} tokens do not fit into a cache of {state.capacity}"
            )
        run = state.runs.get((count, len(rows))) or self._bind(state, count, len(rows))
        if count <= KEPT:
            state.runs[count, len(rows)] = run
        run.embeddings[0] = embeddings
        state.read[state.length : state.length + count] = embeddings
        run.rows[:] = [row % count for row in rows]
        run.last[0] = state.length + count - 1
        run.total[...] = state.length + count
        if self._bind_anew:
            _bind_inputs(run, state)
        self.session.run_with_iobinding(run.binding)
        state.length += count
        logits: Floats = run.logits[0]
        return logits

    def _bind(self, state: LmState, count: int, rows: int) -> _Run:
        """A run of ``count`` tokens with ``rows`` rows of logits on the buffers of ``state``."""
        spec = self._spec
        run = _Run(
            self.session.io_binding(),
            embeddings=np.zeros((1, count, spec.width), np.float32),
            rows=np.zeros(rows, np.int64),
            last=np.zeros(1, np.int32),
            total=np.zeros((), np.int32),
            logits=state.logits[:, :rows]
            if rows <= KEPT
            else np.zeros((1, rows, spec.vocab), np.float32),
        )
        _bind_inputs(run, state)
        run.binding.bind_ortvalue_output("logits", _value(run.logits))
        for name, buffer in state.buffers.items():
            run.binding.bind_ortvalue_output(f"present.{name}", buffer)
        return run


def _bind_inputs(run: _Run, state: LmState) -> None:
    run.binding.bind_ortvalue_input("inputs_embeds", _value(run.embeddings))
    run.binding.bind_ortvalue_input("logit_rows", _value(run.rows))
    run.binding.bind_ortvalue_input("seqlens_k", _value(run.last))
    run.binding.bind_ortvalue_input("total_sequence_length", _value(run.total))
    for name, buffer in state.buffers.items():
        run.binding.bind_ortvalue_input(f"past.{name}", buffer)


def _buffer_names(spec: LmSpec) -> list[str]:
    return [f"{layer}.{part}" for layer in range(spec.layers) for part in ("key", "value")]


def _value(array: NDArray[np.generic]) -> ort.OrtValue:
    """An OrtValue over the array's own memory: writing to the array changes the value."""
    return ort.OrtValue.ortvalue_from_numpy(array)
