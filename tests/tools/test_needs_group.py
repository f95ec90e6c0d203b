# SPDX-License-Identifier: Apache-2.0
"""Tests of a group of patches skip, naming it, where the installed build lacks it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import groups
from tools.repack import RECORD_OF_BUILD
from tools.upstream import ROOT


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch):
    """Call it with the groups that the installed build has."""

    def set_groups(*names: str) -> None:
        monkeypatch.setattr(groups, "installed", lambda: frozenset(names))
        brought = {
            "vllm/a/new.py": {"cpu", "kernels"},
            "vllm/b/__init__.py": {"checks"},
        }
        monkeypatch.setattr(groups, "_bringers", lambda: brought)
        groups._lacking_of_file.cache_clear()

    yield set_groups
    groups._lacking_of_file.cache_clear()


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ("import vllm.a.old, torch", None),
        ("import vllm.a.new", "cpu or kernels"),
        ("from vllm.a import old, new", "cpu or kernels"),
        ("from vllm.b.part import x", None),
        ("from vllm import b", "checks"),
        ("from tests import engine", "cpu"),
        ("from tests.engine import ask", "cpu"),
        ("from tests.v1.utils import PROMPTS", "cpu"),
        ("def test_one():\n    import vllm.a.new", None),
        ("try:\n    import vllm.a.new\nexcept ImportError:\n    pass", None),
        ("pytestmark = pytest.mark.needs_group('serve')", "serve"),
        ("pytestmark = [pytest.mark.gpu, pytest.mark.needs_group('serve')]", "serve"),
        ("pytestmark = pytest.mark.needs_group('fix')", None),
    ],
)
def test_modules_say_what_they_need(source: str, lacks, tmp_path: Path, holds):
    holds("fix")
    file = tmp_path / "test_it.py"
    file.write_text(source)
    assert groups.lacking_of_module(file, has_gpu=False) == lacks


def test_builds_with_the_groups_lack_nothing(tmp_path: Path, holds):
    file = tmp_path / "test_it.py"
    file.write_text("import vllm.a.new\nfrom tests import engine")
    holds("fix", "kernels")
    assert groups.lacking_of_module(file, has_gpu=True) is None
    assert groups.lacking_of_module(file, has_gpu=False) == "cpu"
    holds("fix", "cpu")
    assert groups.lacking_of_module(file, has_gpu=False) is None


def test_a_test_needs_what_it_imports_itself(holds):
    holds("fix")
    test = ast.parse("def test_one():\n    import vllm.a.new").body[0]
    assert groups.lacking(test, has_gpu=True) == "cpu or kernels"


def test_they_skip_and_name_the_group(tmp_path: Path):
    """They are not even imported: nothing below `tmp_path` is a vLLM."""
    info = tmp_path / "vllm-0.20.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.20.2\n"
    )
    (info / RECORD_OF_BUILD).write_text(
        json.dumps({"release": "0.20.2", "groups": ["fix"]})
    )
    files = [
        "tests/kernels/test_int8_compile.py",
        "tests/v1/shutdown/test_killed_worker.py",
    ]
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *files]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "2 skipped" in run.stdout, run.stdout + run.stderr
    for group in ("kernels", "serve"):
        reason = f"needs the group of patches {group}, which this build lacks"
        assert reason in run.stdout
