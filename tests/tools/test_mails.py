# SPDX-License-Identifier: Apache-2.0
"""Mails that give a build's tree, and what they refuse."""

from pathlib import Path

import pytest

from tests.tools.conftest import add_patch
from tools import mails as mails_module
from tools import tree as tree_module
from tools.errors import ForkError
from tools.imports import missing_imports
from tools.mails import make_mails
from tools.series import git
from tools.upstream import Release

NEW = "vllm/layers/new.py"


@pytest.fixture
def release(base: Path, series: Path, overlay: Path, monkeypatch) -> Release:
    monkeypatch.setattr(mails_module, "default_base", lambda _: base)
    return Release("0.20.2", series, {})


def downstream(base: Path, folder: Path, mails: list[Path]) -> Path:
    """A maintainer's tree of upstream's source, with the mails."""
    tree_module.make_pristine(base, folder)
    git("config", "user.name", "A maintainer", cwd=folder)
    git("config", "user.email", "a@example.invalid", cwd=folder)
    git("am", *mails, cwd=folder)
    return folder


def test_mails_alone_give_the_forks_tree(
    release: Release, base: Path, overlay: Path, tmp_path: Path
):
    mails = make_mails(tmp_path / "mails", release)
    assert len(mails) == 2
    assert "new.py" not in mails[0].read_text()
    tree = downstream(base, tmp_path / "downstream", mails)
    assert (tree / NEW).read_bytes() == overlay.read_bytes()
    model = (tree / "vllm/model.py").read_text()
    assert "line_5 = 500" in model
    assert "line_12 = 1200" in model


def test_mails_of_a_group_are_whole_and_alone(
    release: Release, base: Path, overlay: Path, tmp_path: Path
):
    """A file that several patches name comes with the first of those chosen."""
    add_patch(release.series, "later", 17, f"Overlay: {NEW}\n")
    mails = make_mails(tmp_path / "mails", release, ["later"])
    assert [mail.name[:7] for mail in mails] == ["01-0005", "02-0017"]
    tree = downstream(base, tmp_path / "downstream", mails)
    assert (tree / NEW).read_bytes() == overlay.read_bytes()
    model = (tree / "vllm/model.py").read_text()
    assert "line_12 = 12\n" in model
    assert "line_17 = 1700" in model
    mails = make_mails(tmp_path / "mails", release, ["fix"])
    assert len(mails) == 1
    assert not (downstream(base, tmp_path / "fix", mails) / NEW).exists()
    assert len(make_mails(tmp_path / "mails", release)) == 3


def test_mails_want_what_they_import(release: Release, overlay: Path, tmp_path: Path):
    """A patch whose file needs one that travels in another mail."""
    other = overlay.with_name("other.py")
    other.write_text("from vllm.layers.new import NEW\nfrom . import new\n")
    later = add_patch(release.series, "later", 17, "Overlay: vllm/layers/other.py\n")
    assert len(make_mails(tmp_path / "mails", release)) == 3
    with pytest.raises(ForkError, match=r"vllm/layers/other.py: vllm.layers.new.NEW"):
        make_mails(tmp_path / "mails", release, ["later"])
    text = later.read_text()
    later.write_text(text.replace("Overlay", "Depends: 0012\nOverlay"))
    assert len(make_mails(tmp_path / "mails", release, ["later"])) == 3


def test_mails_want_every_overlay_file_named(
    release: Release, overlay: Path, tmp_path: Path
):
    overlay.with_name("orphan.py").write_text("")
    with pytest.raises(ForkError, match="no patch names vllm/layers/orphan.py"):
        make_mails(tmp_path / "mails", release)
    assert not (tmp_path / "mails").exists()


def test_mails_want_named_files_to_exist(
    release: Release, overlay: Path, tmp_path: Path
):
    overlay.rename(overlay.with_name("renamed.py"))
    with pytest.raises(ForkError, match="`Overlay: vllm/layers/new.py` names no file"):
        make_mails(tmp_path / "mails", release)


SOURCES = {
    "vllm/__init__.py": "",
    "vllm/a.py": "def f(): pass\nclass C:\n    def method(self): pass\nx: int = 1\n",
    "vllm/open.py": "from elsewhere import *\n",
    "vllm/lazy.py": "def __getattr__(name): ...\n",
    "vllm/p/__init__.py": "from vllm.a import f as g\n",
    "vllm/p/q.py": "",
    "vllm/_C.abi3.so": "",
}


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("import vllm.a, vllm.p.q, vllm._C, torch.nowhere", []),
        ("import vllm.b", ["vllm.b"]),
        ("from vllm.a import f, C, x", []),
        ("from vllm.a import f, h", ["vllm.a.h"]),
        ("from vllm.p import g, q", []),
        ("from vllm.p import f", ["vllm.p.f"]),
        ("from vllm.open import whatever", []),
        ("from vllm.lazy import whatever", []),
        ("from . import q", []),
        ("from .q import f", ["vllm.p.q.f"]),
        ("from ..a import f", []),
        ("from ..b import f", ["vllm.b.f"]),
        ("def f():\n from vllm.b import g", ["vllm.b.g"]),
        ("try:\n import vllm.b\nexcept ImportError:\n import vllm.c", []),
        ("try:\n import vllm.b\nexcept KeyError:\n pass", ["vllm.b"]),
        ("if find_spec('vllm.b'):\n import vllm.b", []),
        ("if TYPE_CHECKING:\n import vllm.b\nelse:\n import vllm.c", ["vllm.c"]),
    ],
)
def test_missing_imports(source: str, missing: list[str]):
    files = SOURCES | {"vllm/p/new.py": source}
    found = missing_imports(["vllm/p/new.py"], set(files), files.__getitem__)
    assert found == [f"vllm/p/new.py: {name}" for name in missing]
