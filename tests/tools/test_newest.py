# SPDX-License-Identifier: Apache-2.0
"""What tools/newest.py tells of a release that UPSTREAM.toml does not list."""

from types import SimpleNamespace

import pytest

from tests.tools.conftest import MODEL_PY, add_patch
from tools import newest
from tools.errors import ForkError
from tools.newest import failures, newest_release, report
from tools.series import read_series

MODEL = "vllm/model.py"


def package(filename: str, **more: object) -> SimpleNamespace:
    told = {"filename": filename, "package_type": "wheel", "is_yanked": False}
    return SimpleNamespace(**told | more)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The packages that the package index has of vllm."""
    packages: list[SimpleNamespace] = []

    class Index:
        def __init__(self, url: str) -> None: ...
        def __enter__(self) -> "Index":
            return self

        def __exit__(self, *_: object) -> None: ...
        def get_project_page(self, name: str, timeout: float) -> SimpleNamespace:
            assert name == "vllm"
            return SimpleNamespace(packages=packages)

    monkeypatch.setattr(newest, "PyPISimple", Index)
    return packages


def test_the_newest_release_is_no_candidate_and_not_withdrawn(index):
    index += [
        package("vllm-0.9.2-cp38-abi3-manylinux_2_28_x86_64.whl"),
        package("vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl"),
        package("vllm-0.34.0rc1-cp38-abi3-manylinux_2_28_x86_64.whl"),
        package("vllm-0.35.0-cp38-abi3-manylinux_2_28_x86_64.whl", is_yanked=True),
        package("vllm-0.36.0.tar.gz", package_type="sdist"),
    ]
    assert newest_release() == "0.33.0"


def test_no_release_is_an_error_that_says_what_to_do(index):
    with pytest.raises(ForkError, match="tools.newest VERSION"):
        newest_release()


CHANGED = MODEL_PY.replace("line_5 = 5\n", "line_5 = 6\n").encode()


def test_a_patch_that_does_not_apply_is_named_and_the_next_is_tried(series):
    found = failures(read_series(series), {MODEL: CHANGED})
    assert list(found) == ["0005"] and "patch failed: vllm/model.py" in found["0005"]
    assert failures(read_series(series), {MODEL: MODEL_PY.encode()}) == {}


def test_a_file_that_is_gone(series):
    assert list(failures(read_series(series), {MODEL: b""})) == ["0005", "0012"]


def test_the_report_tells_groups_apart(series, monkeypatch: pytest.MonkeyPatch):
    add_patch(series, "last", 16)
    changed = MODEL_PY.replace("line_16 = 16\n", "line_16 = 0\n").encode()
    monkeypatch.setattr(newest, "sources", lambda version, names: {MODEL: changed})
    text = report("0.99.0", series)
    assert text.startswith("vLLM 0.99.0 is out")
    assert "| `fix` | yes, all 1 |" in text and "| `more` | yes, all 2 |" in text
    assert "| `last` | no: 0016 of 2 |" in text
    assert "- 0016: `error: patch failed: vllm/model.py" in text


def test_a_release_that_is_listed_leaves_no_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys
):
    monkeypatch.setattr(newest, "REPORT", tmp_path / "report.md")
    newest.REPORT.write_text("of the week before")
    monkeypatch.setattr(newest.sys, "argv", ["newest", "0.20.2"])
    newest.main()
    assert not newest.REPORT.exists() and "nothing to do" in capsys.readouterr().out
