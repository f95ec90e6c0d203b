# SPDX-License-Identifier: Apache-2.0
"""Changes of the compiled code are caught, by the checks or by the results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.utils import GPU

pytestmark = [
    pytest.mark.needs_group("kernels"),
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(GPU, reason="runs on a CPU"),
]
ROOT = Path(__file__).parents[3]
# The least share that must be caught; docs/design/mi300-kernels.md explains the rest.
SHARES = {
    "load or store dropped": 0.95,
    "barrier dropped": 0.85,
    "wait dropped": 0.85,
    "wait for one less": 0.85,
    "LDS offset changed": 0.9,
    "operands of an MFMA exchanged": 0.9,
    "comparison off by one": 0.4,
    "mask dropped": 0.4,
}


def test_changes_are_caught() -> None:
    """A few of each kind in each kernel."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.amdgcn.mutations", "--most", "4"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout[done.stdout.index("{") :])
    for kind, share in SHARES.items():
        counts = report["kinds"][kind]
        caught = counts["all"] - counts.get("missed", 0)
        missed = [entry for entry in report["missed"] if entry["kind"] == kind]
        assert counts["all"] >= 20, kind
        assert caught >= share * counts["all"], (kind, counts, missed)
