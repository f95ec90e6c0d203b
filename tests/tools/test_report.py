# SPDX-License-Identifier: Apache-2.0
"""`make report`, without a GPU: what it makes of results, failures and crashes."""

import getpass
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tools.conftest import make_base
from tools import report, upstream
from tools.redact import redact
from tools.report import Step, make_report, read_junit, run, run_layer, run_serving
from tools.report_text import MOST_CHARACTERS, markdown
from tools.upstream import ROOT, Release

ABOUT = {"chip": "AMD Instinct MI300X", "driver": "6.12.12", "commit": "0" * 40}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine, a user and a secret, none of which may be told."""
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-17.example.org")
    monkeypatch.setattr(socket, "getfqdn", lambda: "gpu-17.cluster.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "erika")
    monkeypatch.setenv("HOSTNAME", "pod-4711")
    monkeypatch.setenv("SUDO_USER", "mustermann")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    return ["gpu-17", "cluster", "pod-4711", "erika", "mustermann", "hf_abcdefgh"]


def hide(value: Any) -> Any:
    return redact(value, [Path("/home/erika/fork"), Path("/opt/env")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("on gpu-17 and gpu-17.example.org:", "on <host> and <host>:"),
        ("gpu-17.cluster.example.org pod-4711", "<host> <host>"),
        ("erika, mustermann", "<user>, <user>"),
        ("erikas gpu-170", "erikas gpu-170"),
        ("hf_abcdefgh", "<secret>"),
        ("/home/erika/fork/tests/a.py:7: Error", "tests/a.py:7: Error"),
        ('File "/opt/env/lib/x.py", line 3', 'File "lib/x.py", line 3'),
        ('File "/usr/lib/python3.12/x.py", line', 'File "<folder>/x.py", line'),
        ("--model=/data/erika/model", "--model=<folder>/model"),
        ("~/.cache/vllm/x ~/y", "<folder>/x <folder>/y"),
        ("[/mnt/a/b]('/mnt/c/d')", "[<folder>/b]('<folder>/d')"),
        ("from https://github.com/a/b/c", "from https://github.com/a/b/c"),
        ("tokens/s, 3/4, and/or", "tokens/s, 3/4, and/or"),
        ("tests/kernels/test_a.py::test", "tests/kernels/test_a.py::test"),
        ("10.12.0.7:8000, 127.0.0.1:80", "<address>:8000, 127.0.0.1:80"),
        ("torch 2.11.0+rocm7.2.1, 1.2.3", "torch 2.11.0+rocm7.2.1, 1.2.3"),
        ("erika.m@example.org", "<mail>"),
        ("in /home/erika/fork", "in ."),
    ],
)
def test_what_names_the_machine_is_left_out(named: list[str], text: str, expected: str):
    assert hide(text) == expected
    assert hide({"a": [text, 1, None], text: True}) == {
        "a": [expected, 1, None],
        expected: True,
    }


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_run_that_passes(tmp_path: Path):
    step, log = run("one", python("print('said')"), {}, 60, tmp_path)
    assert (step.status, step.failures) == ("passed", [])
    assert log.read_text() == "said\n"


def test_a_run_that_fails_has_the_end_of_its_log(tmp_path: Path):
    code = "import os\nfor n in range(200): print(n)\nraise SystemExit(os.environ['X'])"
    step, _ = run("one", python(code), {"X": "why"}, 60, tmp_path)
    assert step.status == "failed"
    [failure] = step.failures
    assert failure["name"] == "one ended with status 1"
    lines = failure["log"].splitlines()
    assert lines[-2:] == ["199", "why"] and len(lines) == report.LOG_LINES


def test_a_run_that_hangs_is_ended_with_its_children(tmp_path: Path):
    hangs = ["sh", "-c", "sleep 99 & echo $!; sleep 99"]
    started = time.monotonic()
    step, log = run("one", hangs, {}, 2, tmp_path)
    assert time.monotonic() - started < 30
    assert step.status == "failed"
    assert step.failures[0]["name"] == "one was ended after 2 s"
    child = int(log.read_text())
    while has_process(child):  # a busy machine takes a moment
        assert time.monotonic() - started < 60
        time.sleep(0.05)


def has_process(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


TESTS = """
import pytest

def test_right(): pass
def test_wrong(): assert {0} == {1}, "told"
@pytest.mark.parametrize("n", range(30))
def test_many(n): assert n < 0
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("no device")
def test_error(broken): pass
"""


def test_junit_of_a_real_run(tmp_path: Path):
    (tmp_path / "test_some.py").write_text(TESTS)
    junit = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, "-c", os.devnull, f"--junitxml={junit}", str(tmp_path)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    counts, failures = read_junit(junit)
    assert counts == {"passed": 1, "failed": 32, "skipped": 1}
    assert len(failures) == report.MOST_FAILURES
    assert failures[0]["name"].endswith("test_some::test_wrong")
    assert "told" in failures[0]["log"]


def test_tests_that_fail_before_any_ran(tmp_path: Path, monkeypatch):
    """pytest writes no results: what it printed is told."""
    monkeypatch.setattr(report.sys, "executable", "/bin/false")
    step = report.run_tests(tmp_path)
    assert step.status == "failed" and step.counts == {}
    assert step.failures[0]["name"] == "tests ended with status 1"


def test_a_run_without_tests_tells_why(tmp_path: Path, monkeypatch):
    """pytest's results are then empty, and it ends with a status of its own."""

    def fake(name: str, command: list[str], env: dict, timeout_s: float, out: Path):
        (out / "tests.xml").write_text("<testsuites><testsuite/></testsuites>")
        failure = {"name": "tests ended with status 5", "log": "no tests ran"}
        return Step(name, "failed", failures=[failure]), out / "tests.log"

    monkeypatch.setattr(report, "run", fake)
    step = report.run_tests(tmp_path)
    assert step.counts == {"passed": 0, "failed": 0, "skipped": 0}
    assert step.failures[0]["log"] == "no tests ran"


def fake_run(saved: dict[str, Any], status: str, name: str, calls: list):
    """In the place of `run`: a benchmark that has saved rows, and then ends so."""

    def apply(step: str, command: list[str], env: dict, timeout_s: float, out: Path):
        calls.append((command, env))
        (out / "Some_Chip").mkdir(exist_ok=True)
        (out / "Some_Chip" / name).write_text(json.dumps(saved))
        failures = [{"name": "x", "log": "y"}] if status == "failed" else []
        return Step(step, status, failures=failures), out / f"{step}.log"

    return apply


@pytest.mark.parametrize("status", ["passed", "failed"])
def test_rows_of_the_layer(tmp_path: Path, monkeypatch, status: str):
    """Those of a run that fails half-way too; a baseline may be missing."""
    rows = [
        {"m": 1, "stock_us": 46.0, "ours_us": 23.0},
        {"m": 256, "stock_us": None, "ours_us": 1000.0},
    ]
    calls: list = []
    fake = fake_run({"rows": rows}, status, "int8_moe.json", calls)
    monkeypatch.setattr(report, "run", fake)
    step = run_layer(tmp_path)
    assert step.status == status
    assert [(row["what"], row["ratio"]) for row in step.rows] == [
        ("1 tokens, us", 2.0),
        ("256 tokens, us", None),
    ]
    [(command, env)] = calls
    tokens = command[command.index("--tokens") + 1 : command.index("--out")]
    assert len(tokens) == 6
    assert env == {"VLLM_QUARK_INT8_KERNELS": "on"}


def test_rows_of_serving(tmp_path: Path, monkeypatch):
    """A ratio above one is the fork's win, whichever way the figure counts."""
    common = {"batch": 32, "prompt_tokens": 512, "stock": 10.0, "fork": 5.0}
    rows = [
        {"metric": "time", "better": "lower", **common},
        {"metric": "rate", "better": "higher", **common},
    ]
    calls: list = []
    fake = fake_run({"rows": rows}, "passed", "serving_int8_alone.json", calls)
    monkeypatch.setattr(report, "run", fake)
    monkeypatch.setattr(report, "make_stock", lambda out: out / "stock")
    step = run_serving(tmp_path)
    assert [row["ratio"] for row in step.rows] == [2.0, 0.5]
    assert step.rows[0]["what"] == "time, 32 requests of 512"
    [(command, _)] = calls
    assert command[command.index("--fork-moe-backend") + 1] == "quark_int8"


def test_serving_needs_a_stock(tmp_path: Path, monkeypatch):
    def none(_: Path) -> Path:
        raise report.ForkError("expected vLLM to be installed, found none")

    monkeypatch.setattr(report, "make_stock", none)
    step = run_serving(tmp_path)
    assert step.status == "not run"
    assert "found none" in step.failures[0]["log"]


@pytest.mark.parametrize("with_fix", [True, False])
def test_stock_is_the_base_with_the_fix_alone(
    series: Path, overlay: Path, tmp_path: Path, monkeypatch, with_fix: bool
):
    """The series has the patches of lines 5, of `fix`, and 12."""
    if not with_fix:
        text = (series / "series").read_text()
        (series / "series").write_text(text.replace("fix/0005-Change-line-5.patch", ""))
        (series / "fix/0005-Change-line-5.patch").unlink()
    having = {"0.20.2": Release("0.20.2", series, {})}
    monkeypatch.setattr(upstream, "releases", lambda: having)
    base = make_base(tmp_path / "base", "vllm", "0.20.2+rocm721")
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "rocm")
    monkeypatch.setenv("VLLM_PRECOMPILED_WHEEL_LOCATION", str(base))
    model = (report.make_stock(tmp_path / "out") / "vllm/model.py").read_text()
    assert ("line_5 = 500" in model) == with_fix
    assert "line_12 = 12\n" in model


def passing(_: Path) -> Step:
    row = {"what": "1 tokens, us", "stock": 46.1234, "fork": 23.0, "ratio": 2.005}
    return Step("layer", "passed", 12.3, rows=[row])


def failing(_: Path) -> Step:
    log = f"File /home/erika/x/y.py on gpu-17\n{ROOT}/tools/a.py\n```"
    counts = {"passed": 7, "failed": 1, "skipped": 2}
    failure = {"name": "tests.a::test_b[c|d]", "log": log}
    return Step("tests", "failed", 3, counts=counts, failures=[failure])


def crashing(_: Path) -> Step:
    raise ValueError("no such JSON in /mnt/secret/place")


def test_a_report_has_all_that_ran_and_names_nobody(tmp_path: Path, named: list[str]):
    out = tmp_path / "report"
    assert not make_report(out, ABOUT, [failing, crashing, passing])
    text, saved = (out / "report.md").read_text(), (out / "report.json").read_text()
    told = json.loads(saved)
    assert told["about"] == ABOUT
    assert [(s["name"], s["status"]) for s in told["steps"]] == [
        ("tests", "failed"),
        ("crashing", "not run"),
        ("layer", "passed"),
    ]
    for hidden in [*named, str(ROOT), "/home", "/mnt", "secret/place", str(tmp_path)]:
        assert hidden not in text and hidden not in saved, hidden
    for line in (
        "## Quark INT8 on AMD Instinct MI300X",
        "| tests | failed | 3 s | 7 passed, 1 failed, 2 skipped |",
        "| 1 tokens, us | 46.12 | 23 | 2.00x |",
        "<summary>tests.a::test_b[c|d]</summary>",
        "ValueError: no such JSON in <folder>/place",
    ):
        assert line in text
    assert make_report(out, ABOUT, [passing])
    assert "tests" not in json.loads((out / "report.json").read_text())["steps"][0]


def test_a_report_is_there_while_it_goes_on(tmp_path: Path):
    """Of what has ended; whoever interrupts it keeps that."""
    out = tmp_path / "report"

    def interrupted(_: Path) -> Step:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_report(out, ABOUT, [passing, interrupted])
    assert len(json.loads((out / "report.json").read_text())["steps"]) == 1


def test_logs_cannot_break_the_text():
    failure = {"name": "a <b> test", "log": "x\n````\ny\n</details>"}
    step = {"name": "tests", "status": "failed", "seconds": 1, "rows": [], "counts": {}}
    text = markdown({"about": ABOUT, "steps": [step | {"failures": [failure]}]})
    assert "<summary>a &lt;b> test</summary>" in text
    assert re.search(r"^`{5}\nx\n````\ny\n</details>\n`{5}\n</details>$", text, re.M)


def test_cells_of_tables():
    row = {"what": "a | b\nc", "stock": None, "fork": 1234.567, "ratio": None}
    step = {"name": "layer", "status": "passed", "seconds": 1, "counts": {}}
    text = markdown({"about": ABOUT, "steps": [step | {"rows": [row], "failures": []}]})
    assert "| a \\| b c | not measured | 1235 |  |\n" in text


def test_an_issue_takes_the_text():
    failures = [{"name": f"test {n}", "log": "x" * 5000} for n in range(20)]
    step = {"name": "tests", "status": "failed", "seconds": 1, "rows": [], "counts": {}}
    text = markdown({"about": ABOUT, "steps": [step | {"failures": failures}]})
    assert len(text) < MOST_CHARACTERS + 200 and "test 5" in text
    assert text.endswith("report.json has all of it)\n")


@pytest.mark.parametrize("hip", [None, "7.2.1"])
def test_about(monkeypatch: pytest.MonkeyPatch, hip: str | None):
    # Seen on an H200: torch for CUDA puts the chip's name there.
    name = "gfx942:sramecc+:xnack-" if hip else "A chip"
    gpu = SimpleNamespace(total_memory=192 << 30, gcnArchName=name)
    for name, answer in {
        "get_device_properties": gpu,
        "get_device_name": "A chip",
        "get_device_capability": (9, 4),
        "device_count": 8,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    told = report.about()
    assert told["chip"] == "A chip" and told["chips"] == 8
    assert told["memory GiB"] == 192
    assert told["architecture"] == ("gfx942:sramecc+:xnack-" if hip else "sm 9.4")
    assert ("HIP" in told, "CUDA" in told) == (bool(hip), not hip)
    assert told["torch"] == torch.__version__
    assert told["driver"]
    assert re.match(r"[0-9a-f]{40}|not known", told["commit"])


def test_without_a_gpu_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^error: make report measures a GPU") as end:
        report.main()
    assert "\n" not in str(end.value)


def test_make_says_so_before_it_builds():
    done = subprocess.run(
        ["make", "--no-print-directory", "report", "VLLM_TARGET_DEVICE=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode and done.stdout == ""
    assert done.stderr.startswith("error: make report measures a GPU")
