# SPDX-License-Identifier: Apache-2.0
"""Imports of vllm's own modules and names, looked up in a tree of files."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache

Read = Callable[[str], str]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
GUARD = re.compile("TYPE_CHECKING|find_spec")
NOT_FOUND = {"ImportError", "ModuleNotFoundError", "Exception", "AttributeError"}


def missing_imports(names: Iterable[str], files: set[str], read: Read) -> list[str]:
    """What the files `names` import from vllm and the tree does not have, such as
    `vllm/a.py: vllm.b.c`.

    `files` are the tree's, binaries too; `read` gives the source of one. What stands
    in a `try` that expects it to be missing, or in its handlers, is left out, and so is
    what is looked for by `find_spec` first, or is a type checker's alone.
    """

    @cache
    def bound(name: str) -> set[str] | None:
        """The names that a module has; None if that cannot be told."""
        return _bound(ast.parse(read(name)))

    def file_of(module: str) -> str | None:
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if name in files:
                return name
        return None

    def exists(module: str) -> bool:
        path = module.replace(".", "/")
        return file_of(module) is not None or any(
            name.startswith((f"{path}.", f"{path}/")) for name in files
        )

    missing = []
    for name in names:
        package = name.split("/")[:-1]
        for node in imports(ast.parse(read(name))):
            wanted: list[tuple[str, str | None]]
            if isinstance(node, ast.Import):
                wanted = [(alias.name, None) for alias in node.names]
            else:
                base = package[: len(package) + 1 - node.level] if node.level else []
                module = ".".join([*base, *filter(None, [node.module])])
                wanted = [(module, alias.name) for alias in node.names]
            for module, attribute in wanted:
                if module.split(".")[0] != "vllm":
                    continue
                whole = f"{module}.{attribute}" if attribute else module
                if not exists(module):
                    missing.append(f"{name}: {whole}")
                elif attribute and not exists(whole) and (file := file_of(module)):
                    there = bound(file)
                    if there is not None and attribute not in there:
                        missing.append(f"{name}: {whole}")
    return missing


def imports(
    tree: ast.AST, into_functions: bool = True
) -> Iterator[ast.Import | ast.ImportFrom]:
    """What is imported below a node, but what may be missing there."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, FUNCTIONS) and not into_functions:
            continue
        elif isinstance(node, ast.Try) and any(map(_expects_none, node.handlers)):
            rest = [*node.orelse, *node.finalbody]
            yield from imports(ast.Module(rest, []), into_functions)
        elif isinstance(node, ast.If) and GUARD.search(ast.unparse(node.test)):
            yield from imports(ast.Module(node.orelse, []), into_functions)
        else:
            yield from imports(node, into_functions)


def _expects_none(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    return bool(
        {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} & NOT_FOUND
    )


def _bound(module: ast.Module) -> set[str] | None:
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                found.add((alias.asname or alias.name).split(".")[0])
    return None if found & {"*", "__getattr__"} else found
