# SPDX-License-Identifier: Apache-2.0

import re
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.tools.conftest import MODEL_PY, SERIES, add_patch, make_base, make_patch
from tools import tree as tree_module
from tools.errors import ForkError
from tools.fix import PROBES, edits_held
from tools.groups import FIX
from tools.repack import check_named
from tools.series import (
    Message,
    apply_patch,
    check_order,
    choose,
    dependants,
    git,
    group_lines,
    groups_of,
    parse_message,
    read_series,
    series_release,
    touched_files,
)
from tools.table import TABLE, table
from tools.tree import am, export, make_tree, write_patches
from tools.upstream import (
    ROOT,
    Release,
    extra_groups,
    holds_fix,
    releases,
    series_folders,
)

MODEL = "vllm/model.py"
ENV = tree_module.COMMITTER | tree_module.AUTHOR


@pytest.fixture
def release(base: Path, series: Path, overlay: Path, monkeypatch) -> Release:
    """A release of the small base."""
    monkeypatch.setattr(tree_module, "default_base", lambda _: base)
    return Release("0.20.2", series, {})


@pytest.fixture
def exported(release: Release, tmp_path: Path) -> Release:
    """The same, in the very form that an export has."""
    make_tree(tmp_path / "first", release)
    write_patches(tmp_path / "first", release)
    return release


def contents(folder: Path) -> dict[str, str]:
    """Every file below, by its path there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def commit(tree: Path, message: str, *options: str) -> None:
    git("commit", "-qam", message, *options, cwd=tree, env=ENV)


def test_tree_has_a_commit_a_patch(release: Release, tmp_path: Path):
    make_tree(tmp_path / "tree", release)
    subjects = git("log", "--format=%s", "base..", cwd=tmp_path / "tree").stdout
    assert subjects.split("\n")[:2] == ["Change line 12", "Change line 5"]
    pristine = git("show", "base:vllm/model.py", cwd=tmp_path / "tree").stdout
    assert pristine == MODEL_PY
    assert not (tmp_path / "tree/vllm/_C.abi3.so").exists()


def test_export_of_an_unedited_tree_is_the_same(exported: Release, tmp_path: Path):
    before = contents(exported.series)
    make_tree(tmp_path / "tree", exported)
    write_patches(tmp_path / "tree", exported)
    assert contents(exported.series) == before
    assert before["series"] == SERIES


def test_edit_comes_back_as_a_patch(exported: Release, tmp_path: Path):
    tree = tmp_path / "tree"
    make_tree(tree, exported)
    (tree / "vllm/model.py").write_text("edited = True\n")
    with pytest.raises(ForkError, match=r"no commit holds:\n M vllm/model.py"):
        write_patches(tree, exported)
    commit(tree, "Edit the model")
    with pytest.raises(ForkError, match="'Edit the model' has no trailer `Group:`"):
        write_patches(tree, exported)
    trailers = "Forwarded: no\nGroup: more"
    commit(tree, f"Edit the model\n\n{trailers}", "--amend")
    write_patches(tree, exported)
    name = "more/0013-Edit-the-model.patch"
    assert (exported.series / "series").read_text() == f"{SERIES}{name}\n"
    text = (exported.series / name).read_text()
    assert "+edited = True" in text
    assert f"Patch: 0013\n{trailers}" in text
    make_tree(tree, exported)  # which finds no edits
    assert (tree / "vllm/model.py").read_text() == "edited = True\n"


@pytest.mark.parametrize("committed", [True, False])
def test_make_tree_keeps_edits(exported: Release, tmp_path: Path, committed: bool):
    tree = tmp_path / "tree"
    make_tree(tree, exported)
    (tree / "vllm/model.py").write_text("edited = True\n")
    if committed:
        commit(tree, "Edit the model")
    with pytest.raises(ForkError, match="has edits that are not in"):
        make_tree(tree, exported)
    assert (tree / "vllm/model.py").read_text() == "edited = True\n"


def test_patches_need_a_tree(release: Release, tmp_path: Path):
    with pytest.raises(ForkError, match="does not exist; `make tree`"):
        write_patches(tmp_path / "nowhere", release)


@pytest.mark.parametrize(
    ("folder", "name"), [("rebase-apply", "am"), ("rebase-merge", "rebase")]
)
def test_patches_of_a_tree_where_git_stopped(
    exported: Release, tmp_path: Path, folder: str, name: str
):
    """`git am` leaves a clean tree behind, without the patch that did not apply."""
    tree = tmp_path / "tree"
    make_tree(tree, exported)
    (tree / ".git" / folder).mkdir()
    with pytest.raises(ForkError, match=f"`git {name}` stopped there"):
        write_patches(tree, exported)


def test_order_and_comments_survive(exported: Release, tmp_path: Path):
    """A comment stays with its group or its patch, whatever becomes of the others."""
    tree = tmp_path / "tree"
    text = SERIES.replace("fix/0005", "# Of the patch.\nfix/0005") + "# The end.\n"
    (exported.series / "series").write_text(text)
    make_tree(tree, exported)
    write_patches(tree, exported)
    assert (exported.series / "series").read_text() == text
    (tree / "vllm/model.py").write_text("edited = True\n")
    commit(tree, "Another\n\nGroup: new\nForwarded: no")
    git("rebase", "-q", "--onto", "HEAD~2", "HEAD~1", "-X", "theirs", cwd=tree, env=ENV)
    write_patches(tree, exported)
    text = (exported.series / "series").read_text()
    assert "# more" not in text  # the group has gone
    assert "\n# fix: everybody\n# Of the patch.\nfix/0005-Change-line-5.patch\n" in text
    assert "\n# new: say here who needs this group.\nnew/0013-Another.patch\n" in text
    assert text.endswith("# The end.\n")


def test_number_of_a_patch_that_went_is_not_given_again(exported: Release, tmp_path):
    tree = tmp_path / "tree"
    make_tree(tree, exported)
    git("reset", "-q", "--hard", "HEAD~1", cwd=tree)  # without 0012
    (tree / "vllm/model.py").write_text("edited = True\n")
    commit(tree, "Another\n\nGroup: fix\nForwarded: no")
    write_patches(tree, exported)
    assert [p.number for p in read_series(exported.series)] == ["0005", "0013"]


def test_names_end_with_a_whole_word():
    trailers = (("Patch", "0031"), ("Group", "cpu"))
    subject = "A: it's 3.5 times as long as anybody's line: every word, and another"
    assert Message(subject, "", trailers).path == (
        "cpu/0031-A-it-s-3.5-times-as-long-as-anybody-s-line-every-word.patch"
    )
    assert Message("End.", "", trailers).path == "cpu/0031-End.patch"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([("0001", "fix", ""), ("0001", "fix", "")], "0001.*is that of"),
        ([("0001", "fix", "0002"), ("0002", "fix", "")], "names no patch before"),
        (
            [("0001", "fix", ""), ("0002", "cpu", ""), ("0003", "fix", "")],
            r"0003 .* group fix, but comes after patches of cpu: move it behind 0001",
        ),
    ],
)
def test_order_of_patches(messages: list[tuple[str, str, str]], said: str):
    with pytest.raises(ForkError, match=said):
        check_order(
            [
                Message(f"Of {number}", "", trailers(number, group, needs))
                for number, group, needs in messages
            ]
        )


def trailers(number: str, group: str, needs: str) -> tuple[tuple[str, str], ...]:
    depends = (("Depends", needs),) if needs else ()
    return (("Patch", number), ("Group", group), *depends)


def test_message_is_taken_apart():
    message = parse_message(
        "A subject\n\nWhy: this.\n\nMore.\n\nPatch: 0001\nForwarded: no,\n for now\n"
    )
    assert message.subject == "A subject"
    assert message.reason == "Why: this.\n\nMore."
    assert message.trailers == (("Patch", "0001"), ("Forwarded", "no, for now"))
    assert parse_message("A subject\n\nWhy: this.\nMore.").reason == "Why: this.\nMore."


def test_a_tree_knows_its_release(
    exported: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of another release than the patches are written for: it is no edit, and nothing
    is written back from it."""
    other = Release("0.21.0", exported.series, {})
    base = make_base(tmp_path / "other", version="0.21.0")
    moved = base.with_name("moved.whl")
    with ZipFile(base) as old, ZipFile(moved, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            new.writestr(name, b"top = 1\n" + text if name == MODEL else text)
    monkeypatch.setattr(tree_module, "default_base", lambda _: moved)
    before = contents(exported.series)
    tree = tmp_path / "tree"
    make_tree(tree, other)
    make_tree(tree, other)
    with pytest.raises(ForkError, match="is a tree of vLLM 0.21.0, .* for 0.20.2"):
        write_patches(tree, exported)
    with pytest.raises(ForkError, match="is a tree of vLLM 0.21.0"):
        write_patches(tree, other)
    assert contents(exported.series) == before
    (tree / MODEL).write_text("edited = True\n")
    with pytest.raises(ForkError, match="has edits"):
        make_tree(tree, other)


def test_a_series_says_its_release(series: Path):
    assert series_release(series) == "0.20.2"
    (series / "series").write_text("fix/0005-Change-line-5.patch\n")
    with pytest.raises(ForkError, match="expected a line `# release: <version>`"):
        series_release(series)


def test_groups_bring_what_they_depend_on(series: Path):
    add_patch(series, "later", 17, "Depends: 0012\n")
    patches = read_series(series)
    assert groups_of(patches) == ["fix", "more", "later"]
    numbers = [p.number for p in choose(patches, ["fix", "later"])]
    assert numbers == ["0005", "0012", "0017"]
    assert [p.number for p in choose(patches, ["fix"])] == ["0005"]
    assert dependants(patches, ["0012"]) == {"0017"}
    assert dependants(patches, ["0005"]) == set()
    with pytest.raises(ForkError, match="cpu: no such group.* fix, more, later"):
        choose(patches, ["fix", "cpu"])


def test_series_and_folder_must_agree(series: Path):
    (series / "more/0003-Extra.patch").write_text(make_patch(8))
    with pytest.raises(ForkError, match="more/0003-Extra.patch"):
        read_series(series)
    (series / "more/0003-Extra.patch").unlink()
    (series / "fix/0005-Change-line-5.patch").unlink()
    with pytest.raises(ForkError, match="names .*fix/0005-Change-line-5.patch"):
        read_series(series)


@pytest.mark.parametrize("trailer", ["Patch: 0006", "Group: other"])
def test_name_and_trailers_must_agree(series: Path, trailer: str):
    patch = series / "fix/0005-Change-line-5.patch"
    key = trailer.split()[0]
    patch.write_text(re.sub(f"{key} .*", trailer, patch.read_text()))
    with pytest.raises(ForkError, match="expected its name to be "):
        read_series(series)


def test_series_without_some(series: Path):
    assert [p.number for p in read_series(series, ["0005"])] == ["0012"]
    with pytest.raises(ForkError, match="no patch numbered 0007"):
        read_series(series, ["0005", "0007"])


def test_touched_files(series: Path):
    assert touched_files(read_series(series)) == ["vllm/model.py"]
    assert touched_files([]) == []


def test_apply_inside_somebodys_repository(series: Path, tmp_path: Path):
    """git passes over files in silence if it finds a repository above them."""
    git("init", "-q", cwd=tmp_path)
    folder = tmp_path / "below"
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm/model.py").write_text(MODEL_PY)
    assert apply_patch(read_series(series)[0].path, folder) == []
    assert "line_5 = 500" in (folder / "vllm/model.py").read_text()


def test_apply_reports_offsets(series: Path, tmp_path: Path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/model.py").write_text("above = 1\n" + MODEL_PY)
    [remark] = apply_patch(read_series(series)[0].path, tmp_path)
    assert "offset 1 line" in remark


def test_am_says_which_patch_fails(base: Path, series: Path, tmp_path: Path):
    tree_module.make_pristine(base, tmp_path / "tree")
    second = read_series(series)[1].path
    second.write_text(second.read_text().replace("-line_12", "-line_13"))
    with pytest.raises(ForkError, match=f"git am {second.name}"):
        am(second, tmp_path / "tree")
    assert git("status", "--porcelain", cwd=tmp_path / "tree").stdout == ""
    assert not (tmp_path / "tree/.git/rebase-apply").exists()


def test_export_does_not_heed_the_users_git(
    exported: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = contents(exported.series)
    config = tmp_path / "gitconfig"
    config.write_text(
        "[diff]\n\tnoprefix = true\n\tcontext = 7\n[format]\n\tnumbered = true\n"
        "[commit]\n\tgpgsign = true\n[core]\n\tautocrlf = true\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Another")
    make_tree(tmp_path / "tree", exported)
    export(tmp_path / "tree", tmp_path / "out", before["series"])
    assert contents(tmp_path / "out") == before


# Patch -> a piece of the file that it edits, without the edit and with it.
SOURCES = {
    "0001": (
        "scale = ChannelQuantScaleParameter(data=d, weight_loader=weight_loader)",
        "scale = ChannelQuantScaleParameter(data=d, weight_loader=wrap(weight_loader))",
    ),
    "0002": (
        "class QuarkW8A8Int8MoEMethod:\n def f(self): return make()",
        "class QuarkW8A8Int8MoEMethod:\n"
        " def f(self): replace_parameter(); return int8_w8a8_moe_quant_config()",
    ),
    "0003": (
        "class Step3p5ForCausalLM:\n other = {}",
        "class Step3p5ForCausalLM:\n packed_modules_mapping = {}",
    ),
    "0029": (
        "method = QuarkW8A8Fp8MoEMethod(weight_config)",
        "method = QuarkW8A8Int8MoEMethod(weight_config)",
    ),
}


@pytest.mark.parametrize(
    "held", [[], ["0001"], ["0029"], ["0002", "0003"], list(PROBES)]
)
def test_edits_are_recognised(held: list[str]):
    files: dict[str, str] = {}
    for number, (path, _) in PROBES.items():
        files[path] = files.get(path, "") + SOURCES[number][number in held] + "\n"
    assert edits_held(files.__getitem__) == held


@pytest.mark.parametrize("series", series_folders(), ids=lambda series: series.name)
def test_series_in_the_repository_is_whole(series: Path):
    """What a build and `make mails` will ask for, without a base wheel."""
    patches = read_series(series)
    groups = groups_of(patches)
    assert set(groups) == set(group_lines(series))
    written_for = series_release(series)
    assert releases()[written_for].series == series
    assert groups[:1] == [FIX] or (FIX not in groups and holds_fix(written_for))
    for patch in patches:
        assert len(patch.path.stem) <= 60
        for key in ("Forwarded", "Remove-when", "Last-Update"):
            assert patch.message.value(key), (patch.name, key)
        if patch.message.value("Forwarded").startswith("no"):
            assert re.fullmatch("not-needed|no, .+", patch.message.value("Forwarded"))


def test_every_file_of_the_overlay_goes_along_with_a_patch():
    check_named()


def test_a_patch_is_in_one_group_whatever_the_series():
    groups: dict[str, set[str]] = {}
    for folder in series_folders():
        for patch in read_series(folder):
            groups.setdefault(patch.number, set()).add(patch.group)
    assert all(len(found) == 1 for found in groups.values()), groups
    assert set(extra_groups()) < set().union(*groups.values())


def test_patches_of_fix_and_correct_have_tests():
    """Which fail without them: make test-mutants sees that they do."""
    files = (ROOT / "tests").rglob("test_*.py")
    marks = [re.findall(r'needs_patch\("(\d{4})"\)', f.read_text()) for f in files]
    for folder in series_folders():
        for patch in read_series(folder):
            # No test here runs on the vLLM of 0029: examples/fix_alone.py asks it.
            if patch.group in (FIX, "correct") and patch.number != "0029":
                assert patch.number in sum(marks, []), patch.name


def test_the_table_is_what_the_patches_say():
    assert TABLE.read_text() == table()


def test_git_failure_is_not_swallowed(tmp_path: Path):
    with pytest.raises(subprocess.CalledProcessError):
        git("show", "nothing", cwd=tmp_path)
