# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`quark-check`: its arguments, and what is said where a package is missing."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

LAYOUTS = ("quark", "stacked", "per-expert", "compressed-tensors")
DESCRIPTION = (
    "Say what vLLM makes of a Quark INT8 checkpoint, from its config, index and "
    "safetensors headers. Exit status: 0 fine, 1 answers are wrong on some vLLM or "
    "this fork refuses it (with --vllm: that one answers wrong, or refuses it on GPUs "
    "and CPUs), 2 it cannot be read."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .about import About

    parser.add_argument("model", help="a folder, or owner/name on Hugging Face")
    parser.add_argument("--revision", help="branch, tag or commit of owner/name")
    parser.add_argument(
        "--vllm",
        metavar="VERSION",
        help="judge for this release alone, such as 0.32.0, or for this fork on it, "
        "such as 0.20.2+quark2",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--about", action=About, help="say what is installed; end")
    parser.add_argument("--layers", action="store_true", help="a line for each layer")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="zero points, schemes, kernels and what releases know too",
    )
    parser.add_argument(
        "--no-model",
        action="store_true",
        help="do not ask the model of the installed vLLM; tell from what is known",
    )
    parser.add_argument(
        "--deep", action="store_true", help="read the tensors too; needs numpy"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FOLDER",
        help="with --deep: compare with this float checkpoint",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="a histogram of the errors against --reference; needs matplotlib",
    )
    parser.add_argument(
        "--fix", type=Path, metavar="OUT", help="write a mended checkpoint to OUT"
    )
    parser.add_argument(
        "--fix-layout",
        choices=LAYOUTS,
        help="what --fix writes: default is quark where that mends the checkpoint, "
        "else compressed-tensors",
    )


def run_with(args: argparse.Namespace) -> int:
    """Print the report; returns the exit status."""
    # Imported late: `vllm` has the arguments of all its commands. Headers need rich
    # alone of what is not Python's, tensors numpy as well.
    try:
        from . import run

        return run.run(args)
    except BrokenPipeError:  # `| head`; rich ends in the same way
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("rich", "numpy"):
            raise
        print(
            f"error: quark-check: expected the package {package}, found none; "
            f"pip install {package}"
        )
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="quark-check", description=DESCRIPTION)
    add_arguments(parser)
    return run_with(parser.parse_args(arguments))
