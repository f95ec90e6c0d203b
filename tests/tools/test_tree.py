# SPDX-License-Identifier: Apache-2.0

import re
import subprocess
from pathlib import Path

import pytest

from tests.tools.conftest import MODEL_PY, SERIES, make_base, make_patch
from tools import tree as tree_module
from tools.errors import ForkError
from tools.fix import PROBES, edits_held
from tools.series import apply_patch, git, read_series, touched_files
from tools.tree import am, check_base, export, make_mails, make_tree, write_patches
from tools.upstream import Release, overlay_files


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
    identity = tree_module.COMMITTER | tree_module.AUTHOR
    git("commit", "-qam", message, *options, cwd=tree, env=identity)


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


def test_mails_alone_give_the_forks_tree(
    exported: Release, base: Path, overlay: Path, tmp_path: Path
):
    mails = make_mails(tmp_path / "mails", exported)
    assert len(mails) == 2
    assert "new.py" not in mails[0].read_text()
    downstream = tmp_path / "downstream"
    tree_module.make_pristine(base, downstream)
    git("config", "user.name", "A maintainer", cwd=downstream)
    git("config", "user.email", "a@example.invalid", cwd=downstream)
    git("am", *mails, cwd=downstream)
    assert (downstream / "vllm/layers/new.py").read_bytes() == overlay.read_bytes()
    model = (downstream / "vllm/model.py").read_text()
    assert "line_5 = 500" in model
    assert "line_12 = 1200" in model


def test_mails_want_every_overlay_file_named(
    exported: Release, overlay: Path, tmp_path
):
    overlay.with_name("orphan.py").write_text("")
    with pytest.raises(ForkError, match="no patch names vllm/layers/orphan.py"):
        make_mails(tmp_path / "mails", exported)
    assert not (tmp_path / "mails").exists()


def test_mails_want_named_files_to_exist(exported: Release, overlay: Path, tmp_path):
    overlay.rename(overlay.with_name("renamed.py"))
    with pytest.raises(ForkError, match="`Overlay: vllm/layers/new.py` names no file"):
        make_mails(tmp_path / "mails", exported)


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


SOURCES = {
    PROBES["0001"][0]: (
        "scale = ChannelQuantScaleParameter(data=d, weight_loader=weight_loader)",
        "scale = ChannelQuantScaleParameter(data=d, weight_loader=wrap(weight_loader))",
    ),
    PROBES["0002"][0]: (
        "class QuarkW8A8Int8MoEMethod:\n def f(self): return make()",
        "class QuarkW8A8Int8MoEMethod:\n"
        " def f(self): replace_parameter(); return int8_w8a8_moe_quant_config()",
    ),
    PROBES["0003"][0]: (
        "class Step3p5ForCausalLM:\n other = {}",
        "class Step3p5ForCausalLM:\n packed_modules_mapping = {}",
    ),
}


@pytest.mark.parametrize("held", [[], ["0001"], ["0002", "0003"], list(PROBES)])
def test_edits_are_recognised(held: list[str]):
    files = {path: SOURCES[path][n in held] for n, (path, _) in PROBES.items()}
    assert edits_held(files.__getitem__) == held


def test_series_in_the_repository_names_the_whole_overlay():
    """What `make mails` will ask for, without a base wheel."""
    [series] = {candidate.series for candidate in tree_module.releases().values()}
    named = {name for p in read_series(series) for name in p.message.overlay}
    assert named == set(overlay_files())


def test_check_refuses_a_base_that_holds_the_fix(tmp_path: Path, series, monkeypatch):
    base = make_base(tmp_path / "base")
    release = Release("0.20.2", series, {})
    monkeypatch.setattr(tree_module, "edits_held", lambda _: ["0001"])
    with pytest.raises(ForkError, match=r"already holds \['0001'\] before patching"):
        check_base(base, release)
    monkeypatch.setattr(tree_module, "edits_held", lambda _: [])
    with pytest.raises(ForkError, match=r"the series leaves only \[\] done"):
        check_base(base, release)


def test_git_failure_is_not_swallowed(tmp_path: Path):
    with pytest.raises(subprocess.CalledProcessError):
        git("show", "nothing", cwd=tmp_path)
