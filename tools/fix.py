# SPDX-License-Identifier: Apache-2.0
"""Tell from vLLM's source which of the patches of `fix` it holds, whoever made them."""

import ast
from collections.abc import Callable, Iterator

QUARK = "vllm/model_executor/layers/quantization/quark"


def _calls(tree: ast.AST, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == function:
            yield node


def _class(tree: ast.AST, name: str) -> ast.ClassDef | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    return None


def _scales_have_a_loader_of_their_own(tree: ast.Module) -> bool:
    loaders = [
        keyword.value
        for call in _calls(tree, "ChannelQuantScaleParameter")
        for keyword in call.keywords
        if keyword.arg == "weight_loader"
    ]
    return bool(loaders) and getattr(loaders[0], "id", None) != "weight_loader"


def _moe_scales_become_columns(tree: ast.Module) -> bool:
    method = _class(tree, "QuarkW8A8Int8MoEMethod")
    wanted = ("replace_parameter", "int8_w8a8_moe_quant_config")
    return method is not None and all(any(_calls(method, name)) for name in wanted)


def _model_maps_fused_modules(tree: ast.Module) -> bool:
    model = _class(tree, "Step3p5ForCausalLM")
    body = model.body if model else []
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    return any(getattr(t, "id", None) == "packed_modules_mapping" for t in targets)


def _int8_experts_have_a_method(tree: ast.Module) -> bool:
    return any(_calls(tree, "QuarkW8A8Int8MoEMethod"))


# The patches that let a CPU run the models, and read no checkpoint.
CPU_PATCHES = ("0004", "0005", "0006", "0007")

# Patch number -> the file it edits, and how to see the edit there.
PROBES: dict[str, tuple[str, Callable[[ast.Module], bool]]] = {
    "0001": (f"{QUARK}/schemes/quark_w8a8_int8.py", _scales_have_a_loader_of_their_own),
    "0002": (f"{QUARK}/quark_moe.py", _moe_scales_become_columns),
    "0003": ("vllm/model_executor/models/step3p5.py", _model_maps_fused_modules),
    "0029": (f"{QUARK}/quark_moe.py", _int8_experts_have_a_method),
}


def edits_held(read: Callable[[str], str | bytes]) -> list[str]:
    """Numbers of the patches that the tree holds; `read` gives a file by its path."""
    return [
        number
        for number, (path, holds) in PROBES.items()
        if holds(ast.parse(read(path)))
    ]
