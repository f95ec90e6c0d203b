# SPDX-License-Identifier: Apache-2.0
"""What is ready to be sent upstream: examples/upstream has a folder for each patch of
the group `correct`, with a reproduction that ends with 1 on stock vLLM 0.32.0 and 0
here, a test for upstream, and the text of a pull request."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quantization.utils import skip_without_int8_ops
from tools.series import read_series
from tools.upstream import ROOT, release

FOLDERS = sorted((ROOT / "examples/upstream").glob("[0-9]*"))


def test_each_patch_of_correct_has_a_folder():
    patches = read_series(release("0.32.0").series)
    numbers = [patch.number for patch in patches if patch.group == "correct"]
    assert [folder.name[:4] for folder in FOLDERS] == sorted(numbers)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder_is_whole(folder: Path):
    [test] = folder.glob("test_*.py")
    text = (folder / "PULL_REQUEST.md").read_text()
    assert "Goes to tests/" in test.read_text()
    assert test.name in text and "reproduce.py" in text
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "PULL_REQUEST.md",
        "reproduce.py",
        test.name,
    }


@pytest.mark.slow
@pytest.mark.needs_group("correct", "cpu")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_fork_passes(folder: Path, tmp_path: Path):
    if folder.name.startswith("0028"):
        skip_without_int8_ops()
    run = subprocess.run(
        [sys.executable, folder / "reproduce.py"],
        cwd=tmp_path,  # not the root, whose vllm/ holds the overlay alone
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
