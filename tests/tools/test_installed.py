# SPDX-License-Identifier: Apache-2.0
"""The fork as it is installed where the tests run."""

import ast
import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import Distribution, distribution, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools.download import cache_folder
from tools.fix import PROBES, edits_held
from tools.repack import RECORD_OF_BUILD, overlay_of
from tools.series import read_series, touched_files
from tools.upstream import fork_table, overlay_files, release


@pytest.fixture(scope="module")
def fork() -> Distribution:
    return distribution("vllm")


def test_version_names_the_fork(fork: Distribution):
    import vllm

    version = Version(fork.version)
    assert version.local is not None
    assert version.local.split(".")[0] == fork_table()["local_version"]
    assert vllm.__version__ == fork.version


def test_vllm_version_tells_the_forks(fork: Distribution):
    """As people ask for it: `vllm --version`."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == fork.version


def test_the_installed_package_beats_the_overlay_folder(fork: Distribution):
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert Path(str(spec.origin)) == Path(str(fork.locate_file("vllm/__init__.py")))


def test_every_file_is_as_recorded(fork: Distribution):
    assert fork.files
    checked = 0
    for file in fork.files:
        if file.hash is None:
            assert "__pycache__" in file.parts or file.name == "RECORD", file
            continue
        digest = hashlib.new(file.hash.mode, Path(str(file.locate())).read_bytes())
        recorded = file.hash.value.rstrip("=")
        assert (
            base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=") == recorded
        )
        checked += 1
    assert checked > 1000


def test_overlay_and_fix_are_installed(fork: Distribution):
    record = json.loads(fork.read_text(RECORD_OF_BUILD) or "")
    numbers = [patch["number"] for patch in record["patches"]]
    series = read_series(release(Version(fork.version).public).series)
    mine = overlay_of([patch for patch in series if patch.number in numbers])
    for name, source in overlay_files().items():
        file = Path(str(fork.locate_file(name)))
        if name in mine:
            assert file.read_bytes() == source.read_bytes()
        else:
            assert not file.exists()
    held = edits_held(lambda name: Path(str(fork.locate_file(name))).read_bytes())
    assert held == list(PROBES)


def test_patched_files_are_python(fork: Distribution):
    series = release(Version(fork.version).public).series
    for name in touched_files(read_series(series)):
        ast.parse(Path(str(fork.locate_file(name))).read_text())


def test_torch_requirement_is_met_by_either_build(fork: Distribution):
    if "cpu" not in fork.version:
        pytest.skip(f"the CPU wheel's requirement; installed is {fork.version}")
    wanted = [Requirement(line) for line in requires("vllm") or []]
    [torch] = [requirement for requirement in wanted if requirement.name == "torch"]
    expected = "2.13.0" if Version(fork.version) >= Version("0.27") else "2.11.0"
    assert str(torch) == f"torch=={expected}"
    assert torch.specifier.contains(f"{expected}+cpu")


def test_binaries_are_the_bases(fork: Distribution):
    """Byte for byte, against the base wheel in the cache."""
    device = "cpu" if "cpu" in fork.version else "cuda"
    wheels = release(Version(fork.version).public).wheels[device]
    cached = [cache_folder() / sha256 / name for name, sha256 in wheels.items()]
    bases = [path for path in cached if path.exists()]
    if not bases:
        pytest.skip(f"no base wheel of {fork.version} in {cache_folder()}")
    with ZipFile(bases[0]) as base:
        binaries = [name for name in base.namelist() if name.endswith(".so")]
        assert binaries
        for name in binaries:
            installed = Path(str(fork.locate_file(name))).read_bytes()
            assert installed == base.read(name), name
