# SPDX-License-Identifier: Apache-2.0
"""Every instruction of every kernel that is chosen for ROCm has a test."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.amdgcn import test_instructions, test_memory_instructions

pytestmark = pytest.mark.needs_group("kernels")
ROOT = Path(__file__).parents[3]
NAME = re.compile(r"\b(?:s|v|ds|global|buffer)_[a-z]\w*[a-z0-9]\b")


def instructions_tested() -> set[str]:
    """Names in the sources of the tests and in their tables; forms of one operation
    that differ in their encoding alone, _e32 and _e64, count as one."""
    found: set[str] = set()
    for module in (test_instructions, test_memory_instructions):
        assert module.__file__
        found |= set(NAME.findall(Path(module.__file__).read_text()))
    for table in (test_instructions.COMPARISONS, test_memory_instructions.SIZES):
        for text in table:
            found |= set(NAME.findall(text))
    for kind in ("global", "buffer"):
        for size, count in test_memory_instructions.SIZES.items():
            unsigned = "u" if count < 4 else ""
            found |= {f"{kind}_load_{unsigned}{size}", f"{kind}_store_{size}"}
    found |= {f"v_{name}_dpp" for name in ("mov_b32", "add_u32", "add_f32")}
    found |= {f"s_load_dwordx{count}" for count in (2, 4, 8)} | {"s_load_dword"}
    found |= {f"v_permlane{size}_swap_b32" for size in (16, 32)}
    return {without_encoding(name) for name in found}


def without_encoding(name: str) -> str:
    return re.sub(r"_e(32|64)$", "", name)


@pytest.mark.slow
@pytest.mark.long
def test_every_instruction_is_tested() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.amdgcn.compiled"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = json.loads(done.stdout.splitlines()[-1])
    assert len(names) > 180
    missing = {without_encoding(name) for name in names} - instructions_tested()
    assert not missing - {"s_endpgm"}
