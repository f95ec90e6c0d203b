# SPDX-License-Identifier: Apache-2.0
"""Asking checkpoints in another process, one that may end at any of them."""

import json
from pathlib import Path

import pytest

from examples import compare_builds
from examples.compare_builds import ask

# Answers as ask_checkpoints.py does; at a checkpoint named "crash" the process ends.
FAKE = """
import json, os, sys, time
from pathlib import Path
job, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
for name, path in job["checkpoints"].items():
    if name.startswith("crash"):
        print("dying at", name, flush=True)
        os._exit(7)
    answer = {"texts": [path], "logprobs": job["prompts"], "process": os.getpid()}
    (folder / f"{name}.json").write_text(json.dumps(answer))
if "slow" in job["checkpoints"]:
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(compare_builds, "SCRIPT", script)
    monkeypatch.setattr(compare_builds, "WORK", tmp_path / "work")
    return tmp_path / "work"


def asked(*names: str) -> dict:
    checkpoints = {name: Path("/models") / name for name in names}
    return dict(ask("build", checkpoints, [[1, 2]], None))


def test_all_in_one_process_and_in_order():
    answers = asked("a", "b", "c")
    assert list(answers) == ["a", "b", "c"]
    assert [answer["texts"] for answer in answers.values()] == [
        ["/models/a"],
        ["/models/b"],
        ["/models/c"],
    ]
    assert answers["a"]["logprobs"] == [[1, 2]]
    assert len({answer["process"] for answer in answers.values()}) == 1


@pytest.mark.parametrize("crashes", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 1, 2}])
def test_a_crash_costs_one_checkpoint(crashes: set[int], fake: Path):
    names = [f"crash{i}" if i in crashes else f"fine{i}" for i in range(3)]
    answers = asked(*names)
    assert list(answers) == names
    for name, answer in answers.items():
        if name.startswith("fine"):
            assert "error" not in answer
        else:
            assert answer["loaded"] is True
            assert "ended with status 7" in answer["error"]
            log = Path(answer["error"].rpartition("see ")[2])
            assert f"dying at {name}" in log.read_text()


def test_no_checkpoints_start_no_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare_builds, "SCRIPT", Path("/nonexistent"))
    assert asked() == {}


def test_answers_of_an_earlier_run_are_not_taken(fake: Path):
    (fake / "build").mkdir(parents=True)
    (fake / "build/crash.json").write_text(json.dumps({"texts": ["old"]}))
    assert "error" in asked("crash")["crash"]


def test_stopping_early_ends_the_process():
    answers = ask("build", {"slow": Path("slow"), "other": Path("other")}, [], None)
    _, answer = next(answers)
    answers.close()
    assert not Path(f"/proc/{answer['process']}").exists()
