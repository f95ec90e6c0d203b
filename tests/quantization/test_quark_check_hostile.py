# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from strangers: bounded time and memory, one clear error, no code run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vllm.model_executor.layers.quantization.quark.quark_check import (
    checkpoint,
    limits,
    rules,
    run,
)
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    CheckpointError,
)

from tests.fuzz import fuzz_checkpoints, fuzz_quark_check, hostile
from tests.fuzz.files import CONFIG, EXPORTS, Files, pack, parse, unpack

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ROOT / "vllm/model_executor/layers/quantization/quark/quark_check"
SHARD = "model.safetensors"


@pytest.fixture
def files() -> Files:
    """An undamaged export in one file."""
    return dict(EXPORTS[0].files)


def write(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def with_header(files: Files, header: bytes) -> Files:
    return files | {SHARD: pack(header, b"")}


def with_config(files: Files, change) -> Files:
    config = parse(files[CONFIG])
    change(config)
    return files | {CONFIG: json.dumps(config).encode()}


def test_undamaged(files, tmp_path):
    assert run.check(write(tmp_path, files)).exit_status == 1


BOMBS = {
    "deep": b"[" * 10_000_000,
    "deep objects": b'{"a":' * 5_000_000,
    "wide": b'{"a":[' + b"0," * 20_000_000 + b"0]}",
    "objects": b'{"a":[' + b"{}," * 20_000_000 + b"0]}",
    "a million tensors": b"{"
    + b",".join(
        b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number
        for number in range(1_000_000)
    )
    + b"}",
    # The last name twice, which takes long to find by counting.
    "duplicates": b"{"
    + b",".join(b'"%d":1' % min(number, 300_000) for number in range(300_002))
    + b"}",
    "long number": b'{"a":' + b"9" * 10_000_000 + b"}",
    "long shape": b'{"a":{"dtype":"I8","data_offsets":[0,0],"shape":['
    + b",".join([b"9" * 4000] * 5_000)
    + b"]}}",
    "many dimensions": b'{"a":{"dtype":"I8","data_offsets":[0,0],"shape":['
    + b"2," * 2_000_000
    + b"2]}}",
    "no text": b"\xff" * 50_000_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_header_is_a_bomb(bomb, files, tmp_path):
    """In a process of its own, to see what it takes."""
    write(tmp_path, with_header(files, BOMBS[bomb]))
    code = (
        "import pathlib, runpy, sys\n"
        f"sys.argv = ['quark-check', {str(tmp_path)!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(COMMAND)!r}, run_name='__main__')\n"
        "finally:\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    print(*[x for x in lines if 'VmHWM' in x], file=sys.stderr)\n"
    )
    started = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 2, said.stderr
    assert said.stdout.startswith("error: ") and SHARD in said.stdout
    assert len(said.stdout) < 2000
    assert int(said.stderr.split()[1]) < 1024 * 1024  # KiB: 1 GiB
    assert time.monotonic() - started < 30


def test_header_of_100_mb_that_is_not_there(files, tmp_path):
    files[SHARD] = (100_000_000).to_bytes(8, "little") + b"{}"
    with pytest.raises(CheckpointError, match="a header of 100000000"):
        run.check(write(tmp_path, files))


def test_too_many_tensors(files, tmp_path, monkeypatch):
    """In a file, and in all of them."""
    for number, limit in enumerate((5, 25)):
        monkeypatch.setattr(checkpoint, "MAX_TENSORS", limit)
        folder = tmp_path / str(number)
        folder.mkdir()
        held = files if limit == 5 else EXPORTS[1].files
        with pytest.raises(CheckpointError, match=f"at most {limit} tensors"):
            run.check(write(folder, held))


def test_too_large_a_config(files, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_JSON_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1000 bytes"):
        run.check(write(tmp_path, files))


@pytest.mark.parametrize("offsets", [[0, 4], [2, 6], [1 << 62, (1 << 62) + 4]])
def test_offsets_overlap_or_run_past_the_end(offsets, files, tmp_path):
    entry = {"dtype": "I8", "shape": [4]}
    header = {
        "a": entry | {"data_offsets": [0, 4]},
        "b": entry | {"data_offsets": offsets},
    }
    files[SHARD] = pack(json.dumps(header).encode(), bytes(6))
    with pytest.raises(CheckpointError, match=SHARD):
        run.check(write(tmp_path, files))


def test_names_are_shown_harmless(files, tmp_path):
    """Control characters cannot reach the terminal, nor rich's markup be obeyed."""
    evil = "model.\x1b[2J\x1b]0;x\x07.[bold]..\u202e../../etc/passwd.q_proj"
    header, payload = unpack(files[SHARD])
    name = next(n for n in header if n.endswith("q_proj.weight"))
    header[f"{evil}.weight"] = header.pop(name)
    del name
    files[SHARD] = pack(header, payload)
    files = with_config(files, lambda c: c.update(architectures=["\x1b[31mred"]))
    outcome, shown = fuzz_quark_check.judge(write(tmp_path, files))
    assert outcome == "fine", shown  # of that architecture nothing is known
    _, text = fuzz_quark_check.report(tmp_path, as_json=False)
    assert "[bold]" in text and r"\x1b[2J" in text.replace("\n", "")


@pytest.mark.parametrize("pattern", ["re:(a+)+$", "re:(.*)*(.*)*(.*)*y"])
def test_regular_expression_that_never_ends(pattern, files, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 1)
    header, payload = unpack(files[SHARD])
    header["a" * 60 + "!.weight"] = header.pop(
        next(n for n in header if n.endswith("q_proj.weight"))
    )
    files[SHARD] = pack(header, payload)
    files = with_config(
        files, lambda c: c["quantization_config"]["exclude"].append(pattern)
    )
    # Where there is no package that bounds it by itself.
    monkeypatch.setattr(rules, "regex", None)
    rules._pattern.cache_clear()
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="an answer within 1 s"):
        run.check(write(tmp_path, files))
    assert time.monotonic() - started < 10
    rules._pattern.cache_clear()


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(limits, "NUM_BYTES", 256 << 20)
    with (
        pytest.raises(CheckpointError, match="memory"),
        limits.bounded("config.json"),
    ):
        bytearray(1 << 30)
    bytearray(1 << 30)  # and no longer bounded afterwards


@pytest.mark.parametrize("number", [10**9, 10**400])
@pytest.mark.parametrize("key", ["moe_num_experts", "num_hidden_layers"])
def test_more_experts_and_layers_than_there_are(key, number, files, tmp_path):
    """They cost what the headers cost."""
    files = with_config(files, lambda c: c.update({key: number}))
    started = time.monotonic()
    report = run.check(write(tmp_path, files))
    missing = {"experts-miscounted", "weight-missing"}
    assert missing & {each.id for each in report.findings}
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", [CONFIG, SHARD])
def test_what_is_no_file(name, files, tmp_path):
    """A pipe that nobody writes to would be read for ever."""
    write(tmp_path, {key: data for key, data in files.items() if key != name})
    os.mkfifo(tmp_path / name)
    said = subprocess.run(
        [sys.executable, COMMAND, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 2 and name in said.stdout


def test_code_of_the_checkpoint_is_not_run(files, tmp_path):
    mark = tmp_path / "ran"
    files = with_config(
        files,
        lambda c: c.update(
            auto_map={"AutoConfig": "evil.Config"}, trust_remote_code=True
        ),
    )
    files["evil.py"] = f"open({str(mark)!r}, 'w')".encode()
    files["sitecustomize.py"] = files["evil.py"]
    folder = write(tmp_path, files)
    said = subprocess.run(
        [sys.executable, COMMAND, "."], cwd=folder, capture_output=True, text=True
    )
    assert said.returncode == 1 and "code-in-config" in said.stdout
    assert not mark.exists()


def test_hostile_files_repeat():
    for seed in range(10):
        assert hostile.mutate(seed) == hostile.mutate(seed)


@pytest.mark.slow
def test_no_hostile_file_hurts():
    """The first 40 seeds of `make fuzz-check`."""
    outcomes = fuzz_checkpoints.fuzz(list(range(40)), worker=fuzz_quark_check.WORKER)
    assert [outcome["seed"] for outcome in outcomes] == list(range(40))
    failed = [o for o in outcomes if o["outcome"] in fuzz_quark_check.FAILURES]
    assert not failed
    assert {o["outcome"] for o in outcomes} == set(fuzz_quark_check.CLASSES)


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        (lambda arguments: 1 / 0, "traceback"),
        (lambda arguments: print('{"exit_status": 7}') or 7, "status"),
        (lambda arguments: print("no JSON") or 0, "traceback"),
    ],
)
def test_fuzzer_tells_failures(ends, outcome, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "run", ends)
    assert fuzz_quark_check.judge(tmp_path)[0] == outcome


def test_fuzzer_tells_control_characters(monkeypatch, tmp_path):
    def show(arguments):
        print('{"exit_status": 1}' if arguments.json else "\x1b[2J")
        return 1

    monkeypatch.setattr(run, "run", show)
    assert fuzz_quark_check.judge(tmp_path)[0] == "control"
