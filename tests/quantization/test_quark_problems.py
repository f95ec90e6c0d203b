# SPDX-License-Identifier: Apache-2.0
"""The registry of problems, and the table of it in the docs."""

from pathlib import Path

from vllm.model_executor.layers.quantization.quark.quark_check.problems import KINDS

DOCS = Path(__file__).parents[2] / "docs/design/checks.md"


def test_docs_have_the_registry():
    lines = DOCS.read_text().splitlines()
    start = lines.index("| id | class | what | remedy |") + 2
    rows = [
        f"| `{kind.id}` | {kind.severity} | {kind.summary} | {kind.remedy} |"
        for kind in KINDS.values()
    ]
    assert lines[start : start + len(rows) + 1] == [*rows, ""]
