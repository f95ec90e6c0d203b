# SPDX-License-Identifier: Apache-2.0
"""What `make check-patches` refuses: groups that are not whole, or land elsewhere."""

import re
from pathlib import Path

import pytest

from tests.tools.conftest import add_patch
from tools import check_patches
from tools.check_patches import check_base
from tools.errors import ForkError
from tools.upstream import Release


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def release(series: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """A release of the small base, whose patch 0005 is found there once it is
    applied."""
    monkeypatch.setattr(check_patches, "PROBES", {"0005": None})
    held = iter([[], ["0005"]])
    monkeypatch.setattr(check_patches, "edits_held", lambda _: next(held))
    return Release("0.20.2", series, {})


def test_groups_that_are_whole(release: Release, base: Path, scratch: Path):
    add_patch(release.series, "later", 17)
    assert check_base(base, release, scratch) == ([], ["more", "later"])


def test_base_that_holds_the_fix(
    release: Release, base: Path, scratch: Path, monkeypatch
):
    monkeypatch.setattr(check_patches, "edits_held", lambda _: ["0005"])
    with pytest.raises(ForkError, match=r"before patching it holds what \['0005'\] do"):
        check_base(base, release, scratch)


def test_base_that_holds_what_the_series_lacks(
    release: Release, base: Path, scratch: Path, monkeypatch
):
    """As 0.20.0 holds 0029, which the series of 0.19 has, and 0.22.0 the others."""
    monkeypatch.setattr(check_patches, "PROBES", {"0005": None, "0029": None})
    held = iter([["0029"], ["0005", "0029"]])
    monkeypatch.setattr(check_patches, "edits_held", lambda _: next(held))
    assert check_base(base, release, scratch) == ([], ["more"])


def test_base_that_lacks_what_the_series_lacks(
    release: Release, base: Path, scratch: Path, monkeypatch
):
    monkeypatch.setattr(check_patches, "PROBES", {"0005": None, "0029": None})
    with pytest.raises(ForkError, match=r"holds what \[\] do; expected \['0029'\]"):
        check_base(base, release, scratch)


def test_series_without_the_group_fix(
    release: Release, base: Path, scratch: Path, monkeypatch
):
    (release.series / "fix/0005-Change-line-5.patch").unlink()
    (release.series / "series").write_text("more/0012-Change-line-12.patch\n")
    monkeypatch.setattr(check_patches, "edits_held", lambda _: ["0005"])
    assert check_base(base, release, scratch) == ([], ["more"])


def test_series_that_leaves_the_fix_undone(
    release: Release, base: Path, scratch: Path, monkeypatch
):
    monkeypatch.setattr(check_patches, "edits_held", lambda _: [])
    with pytest.raises(ForkError, match=r"with the series it holds what \[\] do"):
        check_base(base, release, scratch)


def test_context_that_another_group_changes(
    release: Release, base: Path, scratch: Path
):
    """Line 13 has the changed line 12 above it in the whole series."""
    patch = add_patch(release.series, "later", 13)
    text = patch.read_text()
    patch.write_text(text.replace(" line_12 = 12\n", " line_12 = 1200\n"))
    with pytest.raises(
        ForkError, match="group later is not whole by itself, .*0005, 0013"
    ):
        check_base(base, release, scratch)


def test_dependency_makes_it_whole(release: Release, base: Path, scratch: Path):
    patch = add_patch(release.series, "later", 13, "Depends: 0012\n")
    text = patch.read_text()
    patch.write_text(text.replace(" line_12 = 12\n", " line_12 = 1200\n"))
    assert check_base(base, release, scratch)[1] == ["more", "later"]


DIFF = """\
diff --git a/vllm/model.py b/vllm/model.py
--- a/vllm/model.py
+++ b/vllm/model.py
"""


def replace_diff(patch: Path, hunk: str) -> None:
    head = patch.read_text().partition("diff --git")[0]
    patch.write_text(f"{head}{DIFF}{hunk}")


def test_hunk_that_lands_elsewhere(release: Release, base: Path, scratch: Path):
    """Without the group before, its lines are found at another place, where git puts
    them without a word: the same text twice, one of which the other group takes."""
    text = "def a():\n    x = 1\n    return x\n\n\ndef b():\n    x = 1\n    return x\n"
    rewrite(base, text)
    fix = release.series / "fix/0005-Change-line-5.patch"
    replace_diff(fix, "@@ -4,3 +4,4 @@\n \n \n+import re\n def b():\n")
    more = release.series / "more/0012-Change-line-12.patch"
    replace_diff(
        more, "@@ -1,3 +1,3 @@\n def a():\n-    x = 1\n+    x = 2\n     return x\n"
    )
    later = add_patch(release.series, "later", 17)
    replace_diff(later, "@@ -2,2 +2,3 @@\n     x = 1\n+    y = 2\n     return x\n")
    with pytest.raises(ForkError, match=r"0017: with fix and later alone its change"):
        check_base(base, release, scratch)


def test_file_that_is_no_python(release: Release, base: Path, scratch: Path):
    later = add_patch(release.series, "later", 17)
    later.write_text(re.sub(r"\+line_17 = .*", "+line_17 =", later.read_text()))
    with pytest.raises(SyntaxError):
        check_base(base, release, scratch)


def test_import_that_another_group_brings(
    release: Release, base: Path, overlay: Path, scratch: Path
):
    later = add_patch(release.series, "later", 17)
    text = later.read_text().replace("+line_17 = 1700", "+import vllm.layers.new")
    later.write_text(text)
    with pytest.raises(ForkError, match="later is not whole.*vllm.layers.new"):
        check_base(base, release, scratch)


def rewrite(base: Path, model: str) -> None:
    """Put another vllm/model.py into a wheel."""
    from zipfile import ZipFile

    with ZipFile(base) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with ZipFile(base, "w") as new:
        for name, data in members.items():
            new.writestr(name, model if name == "vllm/model.py" else data)
