# SPDX-License-Identifier: Apache-2.0
"""The fuzzer: a short run of it, and that it can tell right from wrong."""

import json
import sys

import pytest
import torch
from vllm.platforms import current_platform

from tests.fuzz import files as fuzzed
from tests.fuzz import fuzz_checkpoints, load, mutations
from tests.fuzz.files import CONFIG, EXPORTS, SIZES
from tests.fuzz.judge import judge
from tests.models import step3p5_micro as micro
from tests.models.step3p5_micro import Share

each_export = pytest.mark.parametrize("export", EXPORTS, ids=range(len(EXPORTS)))


def edited(export, change):
    """The export's files after a change to the tensors of the first file."""
    files = dict(export.files)
    shard = min(name for name in files if name.endswith(".safetensors"))
    tensors = fuzzed.read(files[shard])
    change(tensors)
    return files | {shard: fuzzed.write(tensors)}


def a_scale(tensors):
    return tensors[min(name for name in tensors if name.endswith("_scale"))]


def a_weight(tensors):
    return tensors[min(n for n, t in tensors.items() if t.dtype == torch.int8)]


@each_export
def test_judge_reads_an_export(export):
    held = micro.expected(export.stacked, SIZES, Share())
    found = judge(export.files, export)
    assert found is not None and load.same(found, held)


@each_export
def test_judge_tells_another_valid_export(export):
    def other_weight(tensors):
        a_weight(tensors).view(-1)[0] ^= 1

    held = judge(edited(export, other_weight), export)
    assert held is not None
    assert not load.same(held, micro.expected(export.stacked, SIZES, Share()))


@each_export
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, -1.0])
def test_judge_tells_what_is_no_scale(export, value):
    def other_scale(tensors):
        a_scale(tensors).view(-1)[0] = value

    assert judge(edited(export, other_scale), export) is None


@each_export
def test_judge_tells_a_tensor_too_few_and_too_many(export):
    assert judge(edited(export, lambda t: t.pop(min(t))), export) is None
    more = {"x": torch.zeros(1)}
    assert judge(edited(export, lambda t: t.update(more)), export) is None


@each_export
def test_mark(export):
    """What a loader that errs would be called."""
    right = micro.expected(export.stacked, SIZES, Share())
    assert load.mark(right, export.files, export) == "harmless"
    wrong = right | {"lm_head.weight": -right["lm_head.weight"]}
    assert load.mark(wrong, export.files, export) == "wrong"
    damaged = edited(export, lambda tensors: tensors.pop(min(tensors)))
    assert load.mark(wrong, damaged, export) == "accepted"
    assert load.mark(right, damaged, export) == "harmless"
    config = json.loads(export.files[CONFIG])
    config["rope_theta"] = [1.0, 1.0]
    other = export.files | {CONFIG: json.dumps(config).encode()}
    assert load.mark(right, other, export) == "undetectable"
    config["quantization_config"]["global_quant_config"]["weight"]["dtype"] = "int4"
    other = export.files | {CONFIG: json.dumps(config).encode()}
    assert load.mark(right, other, export) == "accepted"


def test_errors_that_name_nothing_are_unclear(tmp_path):
    assert not load.is_clear(KeyError("lm_head"), tmp_path)
    assert not load.is_clear(ValueError("bad value"), tmp_path)
    assert load.is_clear(ValueError(f"{tmp_path}: bad value"), tmp_path)
    assert load.is_clear(ValueError("lm_head.weight: bad value"), tmp_path)


def test_mutations_repeat():
    for seed in range(300):
        assert mutations.mutate(seed) == mutations.mutate(seed)


@pytest.mark.slow
@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs a vLLM built for CPUs")
def test_no_damage_is_read_wrong():
    """The first 200 seeds of `make fuzz`."""
    outcomes = fuzz_checkpoints.fuzz(list(range(200)))
    assert [outcome["seed"] for outcome in outcomes] == list(range(200))
    failed = [o for o in outcomes if o["outcome"] in fuzz_checkpoints.FAILURES]
    assert not failed


def test_ends_of_a_process_are_told_apart(monkeypatch, tmp_path):
    """A worker that dies at seed 1 and hangs at seed 3."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys, time\n"
        "for seed in map(int, sys.stdin.read().split()):\n"
        "    print(json.dumps({'begin': seed}), flush=True)\n"
        "    if seed == 1: os.abort()\n"
        "    if seed == 3: time.sleep(60)\n"
        "    print(json.dumps({'seed': seed, 'outcome': 'refused'}), flush=True)\n"
    )
    monkeypatch.setattr(fuzz_checkpoints, "SECONDS", 2)
    monkeypatch.setattr(fuzz_checkpoints, "WORKER", [sys.executable, str(worker)])
    outcomes = fuzz_checkpoints.fuzz(list(range(5)), num_workers=1)
    assert [outcome["outcome"] for outcome in outcomes] == [
        "refused",
        "crash",
        "refused",
        "hang",
        "refused",
    ]
