# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm quark-check`: say what will happen to a Quark INT8 checkpoint.

Needs neither vLLM nor torch: in a checkout `python <this file>` does the same, beside
any vLLM or none.
"""

import argparse
import os
import sys
import typing
from pathlib import Path

if typing.TYPE_CHECKING or __name__ != "__main__":
    from vllm.entrypoints.cli.types import CLISubcommand
else:
    CLISubcommand = object  # of an upstream that may not be there

ROOT = Path(__file__).resolve().parents[3]
QUARK = "vllm.model_executor.layers.quantization.quark"
LAYOUTS = ("quark", "stacked", "per-expert", "compressed-tensors")
DESCRIPTION = (
    "Say what vLLM makes of a Quark INT8 checkpoint, from its config, index and "
    "safetensors headers. Exit status: 0 fine, 1 answers are wrong on some vLLM or "
    "this fork refuses it, 2 it cannot be read."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, or owner/name on Hugging Face")
    parser.add_argument("--revision", help="branch, tag or commit of owner/name")
    parser.add_argument("--json", action="store_true", help="for machines")
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


def main(args: argparse.Namespace) -> int:
    """Print the report; returns the exit status."""
    # Imported late: `vllm` imports the modules of all its commands. Headers need rich
    # alone of what is not Python's, tensors numpy as well.
    try:
        from vllm.model_executor.layers.quantization.quark.quark_check import run

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


class QuarkCheckSubcommand(CLISubcommand):
    """The `quark-check` subcommand for the vLLM CLI."""

    name = "quark-check"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        sys.exit(main(args))

    def validate(self, args: argparse.Namespace) -> None:
        pass

    def subparser_init(
        self, subparsers: argparse._SubParsersAction
    ) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(
            "quark-check",
            help="Say what vLLM makes of a Quark INT8 checkpoint.",
            description=DESCRIPTION,
            usage="vllm quark-check <folder or owner/name> [options]",
        )
        add_arguments(parser)
        return parser


def cmd_init() -> list[CLISubcommand]:
    return [QuarkCheckSubcommand()]


def _stand_alone() -> None:
    """Make the packages above this command's files without running upstream's code,
    which needs torch and may be that of another release."""
    if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        sys.path.pop(0)  # its modules have names such as `types`
    folder, name = ROOT, ""
    for part in QUARK.split("."):
        folder, name = folder / part, f"{name}.{part}".lstrip(".")
        package = type(sys)(name)
        package.__path__ = [str(folder)]
        sys.modules.setdefault(name, package)


if __name__ == "__main__":
    _stand_alone()
    stand_alone_parser = argparse.ArgumentParser(
        prog="quark-check", description=DESCRIPTION
    )
    add_arguments(stand_alone_parser)
    sys.exit(main(stand_alone_parser.parse_args()))
