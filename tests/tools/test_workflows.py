# SPDX-License-Identifier: Apache-2.0
"""Every `run:` of .github/workflows, with stand-ins for the programs that it calls.

What make's targets do is tested elsewhere; here: that they exist, that each script ends
well where its programs do, and with an error where one fails.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.docs_check import make_targets
from tools.upstream import ROOT, fork_table, releases, series_folders

WORKFLOWS = ROOT / ".github/workflows"
# Programs that a script may call: a stand-in notes its arguments.
STAND_INS = ("make", "gh", "python3")
WHEEL = "vllm-0.20.2+quark2-cp38-abi3-any.whl"
TITLE = "vLLM 0.34.0: which groups apply"


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def scripts() -> list[Any]:
    found = []
    for path in sorted(WORKFLOWS.glob("*.yml")):
        for job in load(path)["jobs"].values():
            for step in job["steps"]:
                if "run" in step:
                    name = f"{path.stem}: {step['name']}"
                    found.append(pytest.param(step["run"], id=name))
    return found


def script(workflow: str, name: str) -> str:
    [found] = [p.values[0] for p in scripts() if p.id == f"{workflow}: {name}"]
    return str(found)


@dataclass
class Shell:
    """A folder with stand-ins, in which a script runs as GitHub runs it."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def stand_in(self, program: str, body: str = "") -> None:
        file = self.folder / "bin" / program
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/bash\necho "{program} $*" >> "$CALLS"\n{body}\n')
        file.chmod(0o755)

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        told = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.folder / "calls"),
            "GITHUB_ENV": str(self.folder / "env"),
            "GITHUB_REF_NAME": fork_table()["local_version"],
        }
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text],
            cwd=self.folder,
            env=told | self.env,
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    made = Shell(tmp_path)
    for program in STAND_INS:
        made.stand_in(program)
    # `make wheel` leaves a wheel, as the real one does.
    made.stand_in(
        "make", f"test $1 != wheel || {{ mkdir -p dist; echo x > dist/{WHEEL}; }}"
    )
    return made


@pytest.mark.parametrize("text", scripts())
def test_a_script_is_bash_and_calls_what_there_is(text: str):
    subprocess.run(["bash", "-n", "-c", text], check=True)
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert target in make_targets()
    for file in re.findall(r"(?:^|\s)(\.?[\w-]+/[\w./-]+)", text):
        if not file.startswith(("build/", "dist/", "first/", "wheels/")):
            assert os.access(ROOT / file, os.X_OK), file


def test_every_script_has_a_test():
    """Those below, by their names."""
    source = Path(__file__).read_text()
    for param in scripts():
        workflow, _, name = str(param.id).partition(": ")
        assert f'"{workflow}", "{name}"' in source or f'"{name}"' in source, param.id


def test_ci_is_ci_run():
    assert script("cpu", "All checks") == ".ci/run"


@pytest.mark.parametrize("workflow", ["gpu-cuda", "gpu-rocm"])
def test_gpus_run_the_tests(shell: Shell, workflow: str):
    assert shell.run(script(workflow, "Tests")).returncode == 0
    assert shell.calls == ["make test"]
    shell.stand_in("make", "exit 1")
    assert shell.run(script(workflow, "Tests")).returncode != 0
    [job] = load(WORKFLOWS / f"{workflow}.yml")["jobs"].values()
    target = workflow.removeprefix("gpu-")
    assert job["runs-on"] == ["self-hosted", target]
    assert job["env"] == {"VLLM_TARGET_DEVICE": target}


def test_rocm_may_have_a_base_wheel_of_its_own(shell: Shell):
    text = script("gpu-rocm", "The base wheel")
    shell.env["BASE"] = ""
    assert shell.run(text).returncode == 0 and not (shell.folder / "env").exists()
    shell.env["BASE"] = "/wheels/vllm-0.20.2+rocm721-any.whl"
    assert shell.run(text).returncode == 0
    told = (shell.folder / "env").read_text()
    assert told == f"VLLM_PRECOMPILED_WHEEL_LOCATION={shell.env['BASE']}\n"


def test_the_series_is_tried(shell: Shell):
    assert shell.run(script("new-release", "Try the newest series")).returncode == 0
    assert shell.calls == ["make new-release"]


@pytest.mark.parametrize(
    ("report", "issues", "opens"),
    [(False, 0, False), (True, 1, False), (True, 0, True)],
    ids=["nothing new", "told before", "new"],
)
def test_an_issue_is_opened_once(shell: Shell, report: bool, issues: int, opens: bool):
    if report:
        (shell.folder / "build").mkdir()
        text = "vLLM 0.34.0 is out, and UPSTREAM.toml does not list it.\n"
        (shell.folder / "build/new-release.md").write_text(text)
    shell.stand_in("gh", f"test $2 != list || echo {issues}")
    said = shell.run(script("new-release", "Open an issue, once a release"))
    assert said.returncode == 0, said.stderr
    created = [call for call in shell.calls if call.startswith("gh issue create")]
    expected = f"gh issue create --title {TITLE} --body-file build/new-release.md"
    assert created == [expected] * opens


def test_an_issue_is_not_opened_where_github_fails(shell: Shell):
    (shell.folder / "build").mkdir()
    (shell.folder / "build/new-release.md").write_text("vLLM 0.34.0 is out\n")
    shell.stand_in("gh", "exit 1")
    said = shell.run(script("new-release", "Open an issue, once a release"))
    assert said.returncode != 0
    assert not any("create" in call for call in shell.calls)


def test_the_tag_is_the_version(shell: Shell):
    shutil.copy(ROOT / "UPSTREAM.toml", shell.folder)
    text = script("release", "The tag is the version that UPSTREAM.toml names")
    assert shell.run(text).returncode == 0
    shell.env["GITHUB_REF_NAME"] = "quark99"
    assert shell.run(text).returncode != 0


def test_wheels_are_built_twice_and_compared(shell: Shell):
    text = script("release", "Build, and build again from a clean tree")
    assert shell.run(text).returncode == 0
    assert shell.calls == ["make wheel", "make clean", "make wheel"]


def test_wheels_that_differ_are_an_error(shell: Shell):
    shell.stand_in("make", f"mkdir -p dist; date +%N > dist/{WHEEL}")
    text = script("release", "Build, and build again from a clean tree")
    assert shell.run(text).returncode != 0


def test_wheels_have_their_sha256(shell: Shell):
    (shell.folder / "wheels").mkdir()
    (shell.folder / "wheels" / WHEEL).write_text("x\n")
    assert shell.run(script("release", "sha256 of each wheel")).returncode == 0
    sums = (shell.folder / "wheels/SHA256SUMS").read_text()
    assert re.fullmatch(rf"[0-9a-f]{{64}}  {re.escape(WHEEL)}\n", sums)


def test_the_release_is_a_draft_with_wheels(shell: Shell):
    (shell.folder / "wheels").mkdir()
    for name in (WHEEL, "SHA256SUMS"):
        (shell.folder / "wheels" / name).write_text("x\n")
    said = shell.run(script("release", "A draft release with the wheels"))
    assert said.returncode == 0, said.stderr
    [call] = shell.calls
    assert call.startswith(
        f"gh release create {fork_table()['local_version']} --draft "
    )
    assert call.endswith(f"wheels/SHA256SUMS wheels/{WHEEL}")


def test_each_series_has_its_wheels():
    """One release of each, for a CPU and for CUDA."""
    matrix = load(WORKFLOWS / "release.yml")["jobs"]["wheels"]["strategy"]["matrix"]
    built = [releases()[version] for version in matrix["release"]]
    assert [release.series for release in built] == series_folders()
    for release in built:
        assert set(matrix["target"]) <= release.wheels.keys()
