"""Where a graph runs: on the CPU, or on another of onnxruntime's execution providers.

onnxruntime gives every node of a graph to the first provider that has a kernel for it. What no
other provider takes runs on the CPU, and nothing is said about it: ``placement`` says it.
docs/edge.md lists which operators of a model each provider has kernels for.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import onnxruntime as ort

from tinyalign.runtime.errors import InputError

CPU = "cpu"
CPU_PROVIDER = "CPUExecutionProvider"
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"  # the option ``placement`` needs
SPOKEN = {"dml": "directml"}  # names people use, where they are not onnxruntime's own
NAMED = 6  # operator types that a line names
# How each provider comes into a Python environment.
SOURCES = {
    "cuda": "install onnxruntime-gpu in its place",
    "tensorrt": "install onnxruntime-gpu in its place",
    "directml": "install onnxruntime-directml in its place, on Windows",
    "openvino": "install onnxruntime-openvino in its place",
    "qnn": "install onnxruntime-qnn beside it",
    "coreml": "the onnxruntime wheels for macOS have it",
    "xnnpack": "no wheel has it: build onnxruntime with --use_xnnpack",
}
# Packages with a provider that onnxruntime takes in as a plugin: their modules.
PLUGINS = {"qnn": "onnxruntime_qnn"}
BEST_DEVICE = ("NPU", "GPU", "CPU")


@dataclass(frozen=True)
class Placement:
    """Which provider runs how many nodes of a graph.

    The nodes are counted as onnxruntime shares them out, before it fuses more of them.
    """

    nodes: dict[str, int]  # provider, as the command line calls it -> nodes
    on_cpu: dict[str, int]  # operator type -> nodes that the CPU runs, most frequent first

    def line(self, provider: str) -> str:
        """What became of the wish to run on ``provider``, in one line."""
        total = sum(self.nodes.values())
        text = f"{self.nodes.get(provider, 0)} of {total} nodes on {provider}"
        if not self.on_cpu:
            return text
        named = [f"{kind} {count}" for kind, count in list(self.on_cpu.items())[:NAMED]]
        if len(self.on_cpu) > NAMED:
            named.append(f"{len(self.on_cpu) - NAMED} more kinds")
        return f"{text}; on the CPU: {', '.join(named)}"


def find_provider(name: str) -> str:
    """onnxruntime's name of a provider ("cuda" -> "CUDAExecutionProvider").

    Raises InputError for a name that onnxruntime does not know, and for a provider that the
    installed onnxruntime does not have, with what brings it.
    """
    known = {spoken_name(full): full for full in ort.get_all_providers()}
    if name not in known:
        names = ", ".join(sorted(known))
        raise InputError(f"there is no execution provider {name!r}: onnxruntime knows {names}")
    if name in PLUGINS:
        _register_plugin(name, known[name])
    if known[name] not in ort.get_available_providers():
        present = " and ".join(sorted(map(spoken_name, ort.get_available_providers())))
        how = SOURCES.get(name, "it takes another build of onnxruntime")
        raise InputError(
            f"the installed onnxruntime {ort.__version__} has {present}, not {name}: {how}"
        )
    full: str = known[name]
    return full


def choose_provider(options: ort.SessionOptions, name: str) -> list[str] | None:
    """Prepare a session's options for a provider; returns the session's ``providers``.

    Raises InputError as ``find_provider`` does.
    """
    if name == CPU:
        return [CPU_PROVIDER]
    full = find_provider(name)
    options.add_session_config_entry(RECORD_PLACEMENT, "1")
    if (device := _plugin_device(full)) is None:
        return [full, CPU_PROVIDER]
    options.add_provider_for_devices([device], {})  # by its name onnxruntime would pass it over
    return None


def check_started(session: ort.InferenceSession, name: str) -> None:
    """Raises InputError if onnxruntime left the provider out: it only logs that, and goes on."""
    if name not in map(spoken_name, session.get_providers()):
        raise InputError(
            f"onnxruntime cannot start {name} here: a device, a driver or one of its libraries "
            "is missing"
        )


def spoken_name(full: str) -> str:
    """A provider as the command line calls it ("CUDAExecutionProvider" -> "cuda")."""
    short = full.removesuffix("ExecutionProvider").lower()
    return SPOKEN.get(short, short)


def placement(session: ort.InferenceSession) -> Placement | None:
    """Which provider runs what of a session that ``choose_provider`` prepared.

    None where onnxruntime is too old to tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    nodes: Counter[str] = Counter()
    on_cpu: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        kinds = [node.op_type for node in part.get_nodes()]
        nodes[spoken_name(part.ep_name)] += len(kinds)
        if part.ep_name == CPU_PROVIDER:
            on_cpu.update(kinds)
    return Placement(dict(nodes), dict(on_cpu.most_common()))


def placement_lines(sessions: Mapping[str, ort.InferenceSession], provider: str) -> list[str]:
    """For each session by its name, what runs on ``provider`` and what fell back to the CPU."""
    lines = []
    for name, session in sessions.items():
        placed = placement(session)
        if placed is None:
            return [f"onnxruntime {ort.__version__} cannot tell which nodes fell back to the CPU"]
        known = placed.line(provider) if placed.nodes else "not known for a graph in ORT format"
        lines.append(f"{name}: {known}")
    return lines


@cache
def _register_plugin(name: str, full: str) -> None:
    """Make the provider of an installed plugin package known to onnxruntime."""
    try:
        package = importlib.import_module(PLUGINS[name])
        ort.register_execution_provider_library(full, package.get_library_path())
    except ImportError:
        return  # not installed
    except Exception as error:  # the binding raises a dozen unrelated types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{PLUGINS[name]} cannot be used: {reason}") from None


def _plugin_device(full: str) -> ort.OrtEpDevice | None:
    """The best device of a provider that is a plugin; None if it is built into onnxruntime."""
    if not hasattr(ort, "get_ep_devices"):
        return None
    devices = [
        device
        for device in ort.get_ep_devices()
        if device.ep_name == full and "library_path" in device.ep_metadata
    ]
    kinds = BEST_DEVICE
    return min(devices, key=lambda d: kinds.index(d.device.type.name), default=None)
