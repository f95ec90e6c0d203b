# SPDX-License-Identifier: Apache-2.0
"""Which groups of patches the installed build has, and which of them a test needs.

What a test module imports of the overlay says so by itself, also through other modules
of this repository, and so do the patches in `needs_patch`; the marker `needs_group`
says the rest.
"""

import ast
import json
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from packaging.version import Version

from tools.groups import FIX
from tools.imports import imports
from tools.repack import RECORD_OF_BUILD
from tools.series import read_series
from tools.upstream import ROOT, holds_fix, release, series_folders

# Modules whose tests start engines: on a CPU these need the group `cpu`.
ENGINES = ("tests.engine", "tests.server", "examples.compare_builds")
OURS = ("tests.", "examples.", "benchmarks.")  # what they import, their users need


@cache
def installed() -> frozenset[str] | None:
    """Groups of the installed build, `fix` where its release holds that itself; None
    for one that does not say, which then passes for the whole."""
    record = distribution("vllm").read_text(RECORD_OF_BUILD)
    if record is None:
        return None
    told = json.loads(record)
    own = [FIX] if holds_fix(told["release"]) else []
    return frozenset([*told["groups"], *own])


def has_group(group: str) -> bool:
    return (held := installed()) is None or group in held


def series() -> Path:
    """Of the installed build's release."""
    return release(Version(distribution("vllm").version).public).series


@cache
def group_of(number: str) -> str:
    """Of a patch, which is in the same group in every series."""
    every = (patch for folder in series_folders() for patch in read_series(folder))
    return next(patch.group for patch in every if patch.number == number)


@cache
def _bringers() -> dict[str, set[str]]:
    """Overlay file -> groups whose patches bring it."""
    found: dict[str, set[str]] = {}
    for patch in read_series(series()):
        for name in patch.message.overlay:
            found.setdefault(name, set()).add(patch.group)
    return found


def lacking(node: ast.AST, has_gpu: bool, is_module: bool = False) -> str | None:
    """A group that a test or a module of tests needs for what it imports, and that the
    installed build lacks; None if it has all. Of a module, what is imported with it."""
    for module in _imported(node, is_module):
        if module in ENGINES and not has_gpu and not has_group("cpu"):
            return "cpu"
        name = module.replace(".", "/")
        for file in (f"{name}.py", f"{name}/__init__.py"):
            groups = _bringers().get(file)
            if groups and not any(map(has_group, groups)):
                return " or ".join(sorted(groups))
        helper = ROOT / f"{name}.py"
        if module.startswith(OURS) and helper.exists():
            group = _lacking_of_file(helper, has_gpu)
            if group:
                return group
    return None


@cache
def _lacking_of_file(path: Path, has_gpu: bool) -> str | None:
    return lacking(ast.parse(path.read_text()), has_gpu, is_module=True)


def lacking_of_module(path: Path, has_gpu: bool) -> str | None:
    """The same of a file of tests, for which it need not be imported."""
    if installed() is None:
        return None
    for group in _marked(ast.parse(path.read_text())):
        if not has_group(group):
            return group
    return _lacking_of_file(path, has_gpu)


def _marked(module: ast.Module) -> Iterator[str]:
    """Groups that a module's `pytestmark` names."""
    for node in module.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "pytestmark"
        ):
            for call in ast.walk(node.value):
                if (
                    isinstance(call, ast.Call)
                    and ast.unparse(call.func) == "pytest.mark.needs_group"
                ):
                    yield from (ast.literal_eval(argument) for argument in call.args)


def _imported(node: ast.AST, is_module: bool) -> Iterator[str]:
    for statement in imports(node, into_functions=not is_module):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif statement.module:
            yield statement.module
            yield from (f"{statement.module}.{a.name}" for a in statement.names)
