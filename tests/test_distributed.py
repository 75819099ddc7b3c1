"""Two processes that share the examples of a step train as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import contextlib
import json
import sys
from pathlib import Path

import torch

from tinyalign.training import modules, stages

sys.path.insert(0, sys.argv[1])
from test_training import RECIPE, tiny_world  # noqa: E402

# What is drawn inside the modules depends on how many examples a process has; bfloat16 rounds.
modules.DROPOUT = 0.0
stages.lm_arithmetic = lambda device=None: contextlib.nullcontext()
torch.set_num_threads(1)
world = tiny_world()
run = stages.Run(world.parts, world, RECIPE, Path(sys.argv[2]) / "run", world.parts.lm)
stages.train_bags(run)
stages.train_slots(run)
stages.train_align(run)
stages.with_lora(run)
stages.train_finetune(run)
if run.accelerator.is_main_process:
    weights = {
        name: value.double().abs().sum().item()
        for module in (run.parts.connector, run.parts.compressor, run.parts.rag_connector, run.lm)
        for name, value in module.state_dict().items()
    }
    result = {"processes": run.accelerator.num_processes, "log": run.log, "weights": weights}
    (Path(sys.argv[2]) / "result.json").write_text(json.dumps(result))
run.accelerator.wait_for_everyone()  # as tinyalign-train ends
run.accelerator.end_training()
"""


def train(folder: Path, processes: int) -> dict:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    alone = [sys.executable]
    shared = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    shared.append(f"--nproc-per-node={processes}")
    command = [*(alone if processes == 1 else shared), str(script), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict = json.loads((folder / "result.json").read_text())
    return found


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert [entry["stage"] for entry in one["log"]] == [entry["stage"] for entry in two["log"]]
    losses = [entry["bits"] for entry in one["log"]]
    assert [entry["bits"] for entry in two["log"]] == pytest.approx(losses, rel=2e-3)
    # Where a gradient is all but zero, AdamW makes whole steps of what rounding left of it.
    assert two["weights"] == pytest.approx(one["weights"], rel=0.1)
