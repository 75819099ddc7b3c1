"""``--provider``: which names are taken, what is said of them, and that answers stay the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tiny_model
from tiny_model import picture

from tinyalign.runtime import InputError, TinyAlign, providers
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.loading import open_session
from tinyalign.runtime.manifest import read_manifest
from tinyalign.runtime.providers import (
    RECORD_PLACEMENT,
    check_started,
    choose_provider,
    find_provider,
    placement,
    placement_lines,
)

NAMED = ("cuda", "coreml", "directml", "xnnpack", "openvino", "qnn")  # in the command's help
COMMAND = Path(sys.executable).with_name("tinyalign-infer")
# onnxruntime's wheels have a second provider, whose operators are calls to a server: it takes no
# node of any of our graphs, so all of them fall back.
azure = pytest.mark.skipif(
    "AzureExecutionProvider" not in ort.get_available_providers(),
    reason="this onnxruntime has no other provider than the CPU's",
)


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    providers._register_plugin.cache_clear()
    yield
    providers._register_plugin.cache_clear()


def test_the_cpu_is_always_there(cpu_only: None) -> None:
    assert find_provider("cpu") == "CPUExecutionProvider"


@pytest.mark.parametrize("name", NAMED)
def test_what_is_not_installed(name: str, cpu_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(InputError, match=rf"has cpu, not {name}: .*onnxruntime") as caught:
        find_provider(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpu", "", "CUDA", "CUDAExecutionProvider"])
def test_unknown_names(name: str, tiny: Path) -> None:
    with pytest.raises(InputError, match=r"knows .*coreml, cpu, cuda, directml") as caught:
        TinyAlign.load(tiny, provider=name)
    assert "\n" not in str(caught.value)


def test_a_provider_that_did_not_start(tiny: Path) -> None:
    """Without a driver onnxruntime leaves a provider out and goes on."""
    with pytest.raises(InputError, match="cannot start cuda here"):
        check_started(open_session(tiny / "connector.onnx", 1), "cuda")


@azure
def test_the_same_answers_and_all_fell_back(tiny: Path) -> None:
    with TinyAlign.load(tiny) as plain, TinyAlign.load(tiny, provider="azure") as model:
        for seed, question in enumerate(("What?", "How many are there?")):
            expected = plain.ask(picture(seed), question, max_tokens=24)
            assert model.ask(picture(seed), question, max_tokens=24).token_ids == expected.token_ids
        assert model.memory(picture(9), "a dog").text == "a dog"
        lines = placement_lines(model.parts.sessions, "azure")
    told = dict(line.split(": ", 1) for line in lines)
    assert set(told) == {"vision", "connector", "rag_connector", "lm"}
    assert told["connector"] == ("0 of 4 nodes on azure; on the CPU: Reshape 2, MatMul 1, ArgMax 1")
    assert "GroupQueryAttention 2" in told["lm"]


@azure
def test_the_command(tiny: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    done = infer(tmp_path, "a.png", "what?", "--model", str(tiny), "--provider", "azure")
    assert done.returncode == 0
    assert done.stdout == infer(tmp_path, "a.png", "what?", "--model", str(tiny)).stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("tinyalign-infer: ") for line in lines)


def test_the_command_on_a_provider_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    done = infer(tmp_path, "a.png", "what?", "--model", str(tiny), "--provider", "rknpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "not rknpu" in done.stderr


def infer(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def part(provider: str, *kinds: str) -> Any:
    """A part of a graph, as onnxruntime tells which provider has it."""
    nodes = [SimpleNamespace(op_type=kind) for kind in kinds]
    return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)


def test_what_a_compiling_provider_took() -> None:
    parts = [
        part("OpenVINOExecutionProvider", "MatMul", "Add", "Mul"),
        part("CPUExecutionProvider", "GroupQueryAttention"),
        part("OpenVINOExecutionProvider", "MatMul"),
        part("CPUExecutionProvider", "GroupQueryAttention"),
        part("CPUExecutionProvider", "Split"),
    ]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    found = placement(session)
    assert found is not None
    assert found.nodes == {"openvino": 4, "cpu": 3}
    assert found.line("openvino") == (
        "4 of 7 nodes on openvino; on the CPU: GroupQueryAttention 2, Split 1"
    )


def test_nothing_fell_back() -> None:
    parts = [part("DmlExecutionProvider", "MatMul", "Add")]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    assert placement_lines({"lm": session}, "directml") == ["lm: 2 of 2 nodes on directml"]


def test_an_onnxruntime_that_cannot_tell() -> None:
    lines = placement_lines({"vision": SimpleNamespace(), "lm": SimpleNamespace()}, "cuda")
    assert len(lines) == 1
    assert "cannot tell" in lines[0]


def test_placement_of_a_session(tiny: Path) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry(RECORD_PLACEMENT, "1")
    session = ort.InferenceSession(tiny / "rag_connector.onnx", options)
    found = placement(session)
    if found is None:
        pytest.skip("this onnxruntime cannot tell")
    assert found.nodes == {"cpu": 5}
    assert found.on_cpu == dict.fromkeys(("Slice", "MatMul", "Abs", "ReduceSum", "Greater"), 1)


# ---- plugins -------------------------------------------------


def plugin(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    module = ModuleType("onnxruntime_qnn")
    module.get_library_path = lambda: library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", module)
    providers._register_plugin.cache_clear()


def test_a_plugin_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plugin(monkeypatch, str(tmp_path / "none.so"))
    with pytest.raises(InputError, match="onnxruntime_qnn cannot be used") as caught:
        find_provider("qnn")
    assert "\n" not in str(caught.value)


def test_a_plugin_runs_on_its_best_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(provider: str, kind: str, **metadata: str) -> Any:
        kind_of = SimpleNamespace(type=SimpleNamespace(name=kind))
        return SimpleNamespace(ep_name=provider, device=kind_of, ep_metadata=metadata)

    devices = [
        device("CPUExecutionProvider", "CPU"),
        device("QNNExecutionProvider", "CPU", library_path="q.so"),
        device("QNNExecutionProvider", "NPU", library_path="q.so"),
        device("QNNExecutionProvider", "GPU", library_path="q.so"),
    ]
    registered: list[tuple[str, str]] = []
    chosen: list[Any] = []
    plugin(monkeypatch, "q.so")
    monkeypatch.setattr(ort, "get_ep_devices", lambda: devices, raising=False)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["QNNExecutionProvider"])
    monkeypatch.setattr(
        ort,
        "register_execution_provider_library",
        lambda *a: registered.append(a),
        raising=False,
    )
    options = SimpleNamespace(
        add_session_config_entry=lambda *_: None,
        add_provider_for_devices=lambda found, _: chosen.extend(found),
    )
    assert choose_provider(options, "qnn") is None
    assert choose_provider(options, "qnn") is None
    assert registered == [("QNNExecutionProvider", "q.so")]
    assert chosen == [devices[2]] * 2
    providers._register_plugin.cache_clear()


# ---- memory of its own ---------------------------------------


class CopyingSession:
    """The CPU's session, but inputs are copied when they are bound, as to a GPU's memory."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.get_inputs = session.get_inputs

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Any:
        binding = self.session.io_binding()

        def bind_copy(name: str, value: ort.OrtValue) -> None:
            copied = np.array(value.numpy())
            bind(name, ort.OrtValue.ortvalue_from_numpy(copied))

        bind, binding.bind_ortvalue_input = binding.bind_ortvalue_input, bind_copy
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        self.session.run_with_iobinding(binding)


def test_a_device_that_copies_its_inputs(tiny: Path) -> None:
    spec = read_manifest(tiny).lm
    session = open_session(tiny / "lm.onnx", 1)
    rows = np.random.default_rng(0).normal(size=(9, tiny_model.D)).astype(np.float32)
    seen = []
    for lm in (LanguageModel(session, spec), LanguageModel(CopyingSession(session), spec)):
        state = lm.new_state(16)
        pieces = [rows[:5], rows[5:7], rows[7:9]]  # the last two share a binding
        seen.append([lm.forward(state, piece).copy() for piece in pieces])
    for mine, theirs in zip(*seen, strict=True):
        assert np.array_equal(mine, theirs)
