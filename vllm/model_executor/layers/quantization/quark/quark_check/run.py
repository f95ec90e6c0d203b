# SPDX-License-Identifier: Apache-2.0
"""`vllm quark-check`: from the arguments to the report."""

import argparse
import io
import json
import sys
from pathlib import Path

from vllm.model_executor.layers.quantization.quark.checkpoint import (
    CheckpointError,
    Files,
)
from vllm.model_executor.layers.quantization.quark.quark_check.hub import find
from vllm.model_executor.layers.quantization.quark.quark_check.limits import bounded
from vllm.model_executor.layers.quantization.quark.quark_check.plan import (
    make_plan,
    open_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.quark_check.releases import judge
from vllm.model_executor.layers.quantization.quark.quark_check.report import (
    UNREADABLE,
    Report,
    error_json,
    make_console,
    printable,
    show,
    to_json,
)


def check(folder: Path, files: Files | None = None) -> Report:
    """The report about the checkpoint of a folder. Raises CheckpointError."""
    with bounded(folder):
        checkpoint = open_checkpoint(folder, files)
        judgement = judge(checkpoint)
        kinds = make_plan(checkpoint)
    return Report(checkpoint, kinds, judgement, judgement.findings)


def run(args: argparse.Namespace) -> int:
    """Print the report that the arguments ask for; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names may have characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = make_console()
    try:
        report = check(*find(args.model, args.revision))
    except CheckpointError as error:
        if args.json:
            print(json.dumps(error_json(error), indent=2))
        else:
            console.print(f"error: {printable(error)}", soft_wrap=True)
        return UNREADABLE
    if args.json:
        print(json.dumps(to_json(report), indent=2))
    else:
        show(report, console, args.layers, args.verbose)
    return report.exit_status
