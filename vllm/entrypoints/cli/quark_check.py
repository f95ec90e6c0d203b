# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The `vllm quark-check` subcommand; all else is in the package that it imports."""

import argparse
import sys

from vllm.entrypoints.cli.types import CLISubcommand
from vllm.model_executor.layers.quantization.quark.quark_check import cli


class QuarkCheckSubcommand(CLISubcommand):
    """The `quark-check` subcommand for the vLLM CLI."""

    name = "quark-check"

    @staticmethod
    def cmd(args: argparse.Namespace) -> None:
        sys.exit(cli.run_with(args))

    def validate(self, args: argparse.Namespace) -> None:
        pass

    def subparser_init(
        self, subparsers: argparse._SubParsersAction
    ) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(
            "quark-check",
            help="Say what vLLM makes of a Quark INT8 checkpoint.",
            description=cli.DESCRIPTION,
            usage="vllm quark-check <folder or owner/name> [options]",
        )
        cli.add_arguments(parser)
        return parser


def cmd_init() -> list[CLISubcommand]:
    return [QuarkCheckSubcommand()]
