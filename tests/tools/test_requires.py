# SPDX-License-Identifier: Apache-2.0
"""A release whose Python or torch is not here is told by one line."""

import platform
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.tools.test_upstream import install_torch
from tools import target
from tools.errors import ForkError
from tools.requires import check_python, headers_of, torch_note

HEADERS = """\
Metadata-Version: 2.1
Requires-Python: <3.15,>=3.11
Requires-Dist: torch==2.11.0+cpu; platform_machine != "none"
Requires-Dist: torch==9.9.9; platform_machine == "none"
Requires-Dist: torchaudio"""


@pytest.mark.parametrize("version", ["3.10.4", "3.15.0", "3.16.0a1"])
def test_python_that_will_not_do(version: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "python_version", lambda: version)
    with pytest.raises(ForkError) as error:
        check_python(HEADERS, "vllm.whl")
    message = str(error.value)
    assert message.startswith(
        f"vllm.whl: expected Python <3.15,>=3.11, found {version}"
    )
    assert "\n" not in message


@pytest.mark.parametrize("version", ["3.11.0", "3.14.9"])
def test_python_that_will_do(version: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "python_version", lambda: version)
    check_python(HEADERS, "vllm.whl")


def test_torch_is_told_where_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = str(tmp_path / "site")
    monkeypatch.setattr(target.sysconfig, "get_path", lambda _: folder)
    assert torch_note(HEADERS, "vllm.whl") is None  # pip will bring one
    install_torch(tmp_path, "cuda = None")
    metadata = tmp_path / "site/torch-2.11.0.dist-info/METADATA"
    for version, told in (("2.11.0+cu130", False), ("2.13.0", True)):
        metadata.write_text(f"Name: torch\nVersion: {version}\n")
        note = torch_note(HEADERS, "vllm.whl")
        assert (note is not None) == told
        if note:
            assert note.startswith("vllm.whl: expected torch 2.11.0, found 2.13.0: ")


def test_wheel_without_metadata(tmp_path: Path):
    with ZipFile(tmp_path / "vllm.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "")
    with (
        ZipFile(tmp_path / "vllm.whl") as wheel,
        pytest.raises(ForkError, match=r"vllm.whl: expected one METADATA, found \[\]"),
    ):
        headers_of(wheel)
