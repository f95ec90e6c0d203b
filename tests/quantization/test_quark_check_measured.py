# SPDX-License-Identifier: Apache-2.0
"""What quark-check says of a release, beside what that release was seen to make of the
same exports (python -m examples.stock_release)."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.quantization.quark.quark_check import run
from vllm.model_executor.layers.quantization.quark.quark_check.architectures import (
    architecture,
)
from vllm.model_executor.layers.quantization.quark.quark_check.releases import scope_of

from tests.fixtures.cells import CELLS
from tests.fixtures.families import BY_NAME, make_export
from tools.upstream import ROOT

# Stock as it is, and with INT8 experts computed in torch by the rules of its kernel for
# GPUs: what GPUs make of it.
FILES = {"cpu": "CPU", "stand-in": "GPU"}


def measured() -> list[Any]:
    found = []
    for kind, platform in FILES.items():
        for file in sorted((ROOT / "docs/results").glob(f"stock-*-{kind}.json")):
            results = json.loads(file.read_text())
            for row in results["rows"]:
                case = results["vllm"], platform, row
                found.append(pytest.param(*case, id=f"{kind}-{row['case']}"))
    return found


def write(case: str, folder: Path) -> Path:
    family, _, export = case.partition("--")
    if export:
        return make_export(BY_NAME[family], export).write(folder)
    [cell] = [cell for cell in CELLS if cell.key == case]
    return cell.write(folder)


@pytest.mark.parametrize(("version", "platform", "row"), measured())
def test_verdict_is_what_was_measured(version, platform, row, tmp_path: Path):
    report = run.check(write(row["case"], tmp_path / "x"), scope=scope_of(version))
    [verdict] = [
        each
        for each in report.judgement.verdicts
        if each.target == f"{version}, {platform}"
    ]
    expected = row["outcome"]
    told = architecture(row["architecture"])
    assert told is not None
    if row.get("unquantized", "right") != "right":
        pytest.skip("stock does not answer the unquantized model right either")
    if version in told.untold:
        assert verdict.outcome in (expected, "not known")
    else:
        assert verdict.outcome == expected, verdict.because


def test_both_kinds_were_measured():
    kinds = {param.values[1] for param in measured()}
    assert kinds == set(FILES.values())
    outcomes = {param.values[2]["outcome"] for param in measured()}
    assert outcomes >= {"right", "garbage", "refused"}
