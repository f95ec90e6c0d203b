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
PATTERNS = "vllm/model_executor/layers/quantization/utils/config_utils.py"
FUSED_MOE = "vllm/model_executor/layers/fused_moe"
KERNEL, ORACLE = f"{FUSED_MOE}/fused_moe.py", f"{FUSED_MOE}/oracle/int8.py"
TUNED, CPU = f"{FUSED_MOE}/config.py", f"{FUSED_MOE}/experts/quark_int8_cpu.py"
BASE_METHOD = f"{FUSED_MOE}/fused_moe_method_base.py"
FILES = (
    *(CONFIG, MOE, UTILS, INT8, STEP, PATTERNS),
    *(KERNEL, ORACLE, TUNED, CPU, BASE_METHOD),
)
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
    file = Path(str(fork.locate_file(name)))
    return file.read_bytes() if file.exists() else b""


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


def names(tree: ast.AST | None) -> set[str]:
    """Of variables, attributes and parameters."""
    kinds = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg"}
    return {
        getattr(node, kinds[type(node)])
        for node in (ast.walk(tree) if tree else ())
        if type(node) in kinds
    }


def matches_globs(trees: Trees) -> bool:
    """From 0.30.0 on the function that could is shared, and not asked to."""
    matching = {"matches", "shards_excluded", "fnmatch", "fnmatchcase"}
    return bool(matching & set(calls(trees[UTILS]))) or "use_fnmatch" in names(
        trees[UTILS]
    )


def own_experts(trees: Trees) -> bool:
    """The experts are chosen by this fork, for every scheme (patch 0028)."""
    chosen = {"select_quark_int8_experts", "select_quark_int8_backend"}
    return bool(chosen & set(calls(find(trees[MOE], INT8_EXPERTS))))


def static_ends(trees: Trees) -> bool:
    """With static activations no experts are chosen: the method has None of them, and
    its base asks that whether it is monolithic."""
    method = find(trees[MOE], INT8_EXPERTS)
    has_none = any(
        isinstance(node, ast.AnnAssign)
        and ast.unparse(node.target) == "self.experts_cls"
        and node.value is not None
        and ast.unparse(node.value) == "None"
        for node in (ast.walk(method) if method else ())
    )
    asked = find(trees[BASE_METHOD], "is_monolithic")
    asks = asked is not None and "self.experts_cls.is_monolithic()" in ast.unparse(
        asked
    )
    own = method is not None and "is_monolithic" in ast.unparse(method)
    return has_none and asks and not own and not own_experts(trees)


def has_int8_activations(trees: Trees) -> bool:
    """Where experts come from the oracle, it does not take the lack of scales of
    activations for a lack of their quantization."""
    method = find(trees[MOE], INT8_EXPERTS)
    if method is None or own_experts(trees):
        return method is not None
    if "make_int8_moe_quant_config" not in calls(method):
        return True
    asked = find(trees[ORACLE], "make_int8_moe_quant_config")
    tests = [n.test for n in ast.walk(asked) if isinstance(n, ast.If)] if asked else []
    return any("per_act_token_quant" in names(test) for test in tests)


def strides_one_scale(trees: Trees) -> bool:
    """The kernel goes on by the stride of [E] from expert to expert."""
    return any(
        ast.unparse(node.body) == "B_scale.stride(0)"
        and ast.unparse(node.test) == "B_scale is not None"
        for node in ast.walk(trees[KERNEL])
        if isinstance(node, ast.IfExp)
    )


def packs_for_a_cpu(trees: Trees) -> bool:
    """The method has the experts that it chose prepare their weights."""
    method = find(trees[MOE], INT8_EXPERTS)
    prepare = "fused_experts.process_weights_after_loading"
    return method is not None and prepare in ast.unparse(method)


# Fact -> how to see it in the sources.
SEEN: dict[str, Callable[[Trees], bool]] = {
    "int8-experts": lambda trees: find(trees[MOE], INT8_EXPERTS) is not None,
    "per-token": lambda trees: (
        find(trees[CONFIG], "_is_dynamic_per_token_w8a8") is not None
        or find(trees[CONFIG], "_is_w8a8_int8") is not None
    ),
    "fused-names": held_edit("0003"),
    "linear-columns": held_edit("0001"),
    "expert-columns": held_edit("0002"),
    "quark-patterns": matches_globs,
    "expert-names": lambda trees: (
        "experts_excluded" in calls(find(trees[CONFIG], "get_quant_method"))
        or "check_children" in names(trees[CONFIG]) & names(trees[UTILS])
    ),
    "own-fused-names": lambda trees: (
        "find_matching_patterns" in calls(trees[UTILS])
        and find(trees[PATTERNS], "find_matching_patterns") is not None
        or "check_config" in calls(find(trees[CONFIG], "from_config"))
    ),
    "quark-overrides": lambda trees: (
        "layer_config" in calls(find(trees[CONFIG], "_find_matched_config"))
    ),
    "expert-tensor-scales": lambda trees: (
        "repeat_interleave" in calls(find(trees[MOE], INT8_EXPERTS))
        or strides_one_scale(trees)
    ),
    "expert-static": lambda trees: (
        find(trees[MOE], INT8_EXPERTS) is not None and not static_ends(trees)
    ),
    "expert-static-refusal": lambda trees: own_experts(trees) or static_ends(trees),
    "expert-int8-activations": has_int8_activations,
    "cpu-experts": lambda trees: (
        find(trees[CPU], "Int8CpuExperts") is not None or packs_for_a_cpu(trees)
    ),
    "tuned-configs": lambda trees: (
        "'int8_w8a8'"
        in ast.unparse(find(trees[TUNED], "_get_config_dtype_str") or ast.Pass())
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


def test_facts_name_patches_of_some_series():
    numbers = {path.name[:4] for path in (ROOT / "patches").rglob("*.patch")}
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
    """On a newer release than the default one upstream's further ones, too."""
    kernels = known.facts_file()["kernel"]
    found = {
        platform.name: [kernel.__name__ for kernel in tried]
        for platform, tried in _POSSIBLE_INT8_KERNELS.items()
    }
    forced = FewTokensInt8ScaledMMLinearKernel.__name__
    found["CUDA"].insert(0, forced)
    if not importlib.metadata.version("vllm").startswith(known.BASE):
        for platform, told in kernels["linear"].items():
            found[platform] = [name for name in found[platform] if name in told]
        found = {platform: found[platform] for platform in kernels["linear"]}
    assert found == kernels["linear"]
    tried = {experts_cls.__name__ for experts_cls in experts_classes()}
    told = {name for names in kernels["experts"].values() for name in names}
    assert tried | {TritonInt8Experts.__name__} == told
