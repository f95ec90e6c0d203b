# SPDX-License-Identifier: Apache-2.0
"""What `vllm serve` shows for a checkpoint that it refuses."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quantization.exports import FIXTURES, STACKED, Export

pytestmark = pytest.mark.needs_group("checks")

# The command, whether vLLM is installed or on PYTHONPATH.
VLLM = sys.executable, "-m", "vllm.entrypoints.cli.main"
OPTIONS = ["--enforce-eager", "--max-model-len=256", "--gpu-memory-utilization=0.1"]
SCALE = "model.layers.2.moe.down_proj.weight_scale"


def serve(folder: Path) -> tuple[int, str]:
    """Exit status and output of `vllm serve`, which is to end by itself."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURES / STACKED / name, folder)
    run = subprocess.run(
        [*VLLM, "serve", folder, *OPTIONS],
        env=os.environ | {"VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return run.returncode, run.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "export"


@pytest.mark.slow
def test_bad_scale_ends_the_server_before_weights_are_read(folder):
    export = Export(STACKED)
    export.tensors[SCALE].view(-1)[3] = 0
    status, output = serve(export.write(folder))
    assert status == 1
    shown = re.findall(rf"CheckpointError: {SCALE} .*", output)
    assert shown and "found 0.0 at [0, 3], 1 of 2048 such" in shown[0]
    assert "Loading weights took" not in output


def test_damaged_file_ends_the_server_before_an_engine_starts(folder):
    file = Export(STACKED).write(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    status, output = serve(folder)
    assert status == 1
    last = output.strip().splitlines()[-3:]
    assert any(str(file) in line and "it is cut off" in line for line in last)
    assert "EngineCore" not in output and "Worker" not in output
