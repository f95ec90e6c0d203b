# SPDX-License-Identifier: Apache-2.0
"""The facts about releases, each looked up in the sources of those releases."""

import ast
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm.model_executor.kernels.linear import _POSSIBLE_INT8_KERNELS
from vllm.model_executor.kernels.linear.scaled_mm.int8_few_tokens import (
    FewTokensInt8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.fused_moe.experts.triton_int8_moe import (
    TritonInt8Experts,
)
from vllm.model_executor.layers.fused_moe.oracle.quark_int8 import experts_classes
from vllm.model_executor.layers.quantization.quark.quark_check import releases as known

from tools.errors import ForkError
from tools.fix import PROBES, QUARK
from tools.peek import sources
from tools.upstream import ROOT

CONFIG, MOE, UTILS = (f"{QUARK}/{name}.py" for name in ("quark", "quark_moe", "utils"))
INT8 = f"{QUARK}/schemes/quark_w8a8_int8.py"
STEP = "vllm/model_executor/models/step3p5.py"
FILES = (CONFIG, MOE, UTILS, INT8, STEP)
INT8_EXPERTS = "QuarkW8A8Int8MoEMethod"
FORK = "fork"

VERSIONS = [version for each in known.releases() for version in each.looked_into]
FACTS = [known.fact(id) for id in known.facts_file()["fact"]]

Trees = dict[str, ast.Module]


def read(version: str, name: str) -> bytes:
    if version != FORK:
        try:
            return sources(version, [name])[name]
        except ForkError as error:
            pytest.skip(f"needs the sources of vLLM {version}: {error}")
    fork = importlib.metadata.distribution("vllm")
    return Path(str(fork.locate_file(name))).read_bytes()


@pytest.fixture(scope="module", params=[*VERSIONS, FORK])
def release(request: pytest.FixtureRequest) -> tuple[str, Trees]:
    trees = {name: ast.parse(read(request.param, name)) for name in FILES}
    return request.param, trees


def find(tree: ast.AST, name: str) -> ast.AST | None:
    """The first class or function of that name."""
    kinds = ast.ClassDef | ast.FunctionDef
    named = (n for n in ast.walk(tree) if isinstance(n, kinds) and n.name == name)
    return next(named, None)


def calls(tree: ast.AST | None) -> Iterator[str]:
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Call):
            yield str(getattr(node.func, "id", getattr(node.func, "attr", "")))


def held_edit(number: str) -> Callable[[Trees], bool]:
    path, holds = PROBES[number]
    return lambda trees: holds(trees[path])


# Fact -> how to see it in the sources.
SEEN: dict[str, Callable[[Trees], bool]] = {
    "int8-experts": lambda trees: find(trees[MOE], INT8_EXPERTS) is not None,
    "per-token": lambda trees: (
        find(trees[CONFIG], "_is_dynamic_per_token_w8a8") is not None
    ),
    "fused-names": held_edit("0003"),
    "linear-columns": held_edit("0001"),
    "expert-columns": held_edit("0002"),
    "quark-patterns": lambda trees: bool(
        {"matches", "fnmatch", "fnmatchcase"} & set(calls(trees[UTILS]))
    ),
    "expert-names": lambda trees: (
        "experts_excluded" in calls(find(trees[CONFIG], "get_quant_method"))
    ),
    "quark-overrides": lambda trees: (
        "layer_config" in calls(find(trees[CONFIG], "_find_matched_config"))
    ),
    "expert-tensor-scales": lambda trees: (
        "repeat_interleave" in calls(find(trees[MOE], INT8_EXPERTS))
    ),
    "expert-static-refusal": lambda trees: (
        "select_quark_int8_experts" in calls(find(trees[MOE], INT8_EXPERTS))
    ),
    "load-checks": lambda trees: (
        "check_config" in calls(find(trees[CONFIG], "from_config"))
    ),
}


def test_every_fact_says_how_it_is_known():
    assert set(SEEN) == {fact.id for fact in FACTS if fact.checked}
    for fact in FACTS:
        assert fact.says
        assert bool(fact.why) != fact.checked
        assert not fact.since or fact.since in VERSIONS


def test_facts_name_patches_of_the_series():
    numbers = {path.name[:4] for path in (ROOT / "patches/v0.20").rglob("*.patch")}
    assert {fact.patch for fact in FACTS if fact.patch} <= numbers


@pytest.mark.parametrize("id", SEEN)
def test_fact_is_in_the_sources(id, release):
    version, trees = release
    fact = known.fact(id)
    expected = version == FORK or fact.is_in(version)
    assert SEEN[id](trees) == expected


def test_ranges_hold_their_releases():
    """No release of a range differs from its oldest in any fact."""
    for each in known.releases():
        for fact in FACTS:
            told = {fact.is_in(version) for version in each.looked_into}
            assert len(told) == 1


def test_kernels_are_those_that_the_fork_tries():
    kernels = known.facts_file()["kernel"]
    found = {
        platform.name: [kernel.__name__ for kernel in tried]
        for platform, tried in _POSSIBLE_INT8_KERNELS.items()
    }
    forced = FewTokensInt8ScaledMMLinearKernel.__name__
    found["CUDA"].insert(0, forced)
    assert found == kernels["linear"]
    tried = {experts_cls.__name__ for experts_cls in experts_classes()}
    told = {name for names in kernels["experts"].values() for name in names}
    assert tried | {TritonInt8Experts.__name__} == told
