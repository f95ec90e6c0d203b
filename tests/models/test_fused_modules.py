# SPDX-License-Identifier: Apache-2.0
"""Every model of the release says what it fuses, or fuses what export.py knows."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.model_executor import models
from vllm.model_executor.layers.quantization.quark.quark_check.export import (
    USUAL_SHARDS,
    Export,
)

FOLDER = Path(models.__file__).parent
SOURCES = sorted(FOLDER.rglob("*.py"))
# Fused modules that hold no linear layer, or whose parts have one model's own names:
# a float part of them is refused by name while it is loaded.
LEFT = {
    ("aria.py", "w13_weight"),
    ("aria.py", "w2_weight"),
    ("cohere_asr.py", "qkv_proj"),
    ("cohere_asr.py", "kv_proj"),
    ("olmo_hybrid.py", "conv1d"),
    ("telechat2.py", "qkv_proj"),
}


def assigned(tree: ast.AST, name: str) -> Iterator[ast.expr]:
    """The values that are given to variables, attributes or arguments of that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == name:
            yield node.value
            continue
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        for target in targets:
            if name in (getattr(target, "id", ""), getattr(target, "attr", "")):
                yield value


def literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def told(tree: ast.AST) -> set[str]:
    """The fused modules that the file's packed_modules_mappings have."""
    return {
        key
        for value in assigned(tree, "packed_modules_mapping")
        if isinstance(value, ast.Dict)
        for node in value.keys
        if node is not None and isinstance(key := literal(node), str)
    }


def stacked(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """vLLM's name of a fused module and a part's name: of loaders' lists, and of what
    newer releases tell a WeightsMapper instead."""
    for value in assigned(tree, "stacked_params_mapping"):
        for node in value.elts if isinstance(value, (ast.List, ast.Tuple)) else ():
            match literal(node):
                case (str(whole), str(part), _):
                    yield whole, part
    for value in assigned(tree, "orig_to_new_stacked"):
        if not isinstance(value, ast.Dict):
            continue
        for key, node in zip(value.keys, value.values, strict=True):
            match key and literal(key), literal(node):
                case str(part), (str(whole), _):
                    yield whole, part


def last_name(name: str) -> str:
    """Of a module, also where one of its parameters is named."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    return module.strip(".").split(".")[-1]


def fused(tree: ast.AST) -> dict[str, tuple[str, ...]]:
    """What the file fuses: vLLM's last name -> last names of the parts."""
    found: dict[str, tuple[str, ...]] = {}
    for whole, part in stacked(tree):
        last = last_name(whole)
        found[last] = tuple(dict.fromkeys((*found.get(last, ()), last_name(part))))
    return found


def untold() -> list[tuple[str, str, tuple[str, ...]]]:
    found = []
    for source in SOURCES:
        tree = ast.parse(source.read_text())
        names = told(tree)
        for last, parts in fused(tree).items():
            if last not in names and (source.name, last) not in LEFT:
                found.append((source.name, last, parts))
    return found


UNTOLD = untold()


def test_models_that_say_nothing_are_found():
    files = {file for file, *_ in UNTOLD}
    assert {"stablelm.py", "orion.py", "step3_text.py", "qwen3_moe.py"} <= files


@pytest.mark.parametrize("file, last, parts", UNTOLD)
def test_parts_are_known(file, last, parts):
    ways = USUAL_SHARDS.get(last, ())
    assert any(set(way) <= set(parts) for way in ways), f"{file}: {last} of {parts}"


def test_what_files_hold_chooses_among_names():
    """Of the parts' names, those of the files; a module that is stored whole is one."""

    def shards(*modules: str) -> list[str]:
        export = Export({}, {"exclude": [], "global_quant_config": {}})
        export.modules = {name: {} for name in modules}
        export._names = {name: name for name in modules}
        return export.shards("a.gate_up_proj", {})

    assert shards("a.gate_proj", "a.up_proj", "a.w1") == ["a.gate_proj", "a.up_proj"]
    assert shards("a.w1", "a.w3") == ["a.w1", "a.w3"]
    assert shards("a.gate_up_proj", "a.gate_proj") == ["a.gate_up_proj"]
    assert shards("b.c.gate_proj", "b.c.up_proj") == []
