# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm quark-check`: from the arguments to the report."""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from .about import installed
from .checkpoint import CheckpointError, Files, misfit
from .dry_run import DryRun, dry_run
from .hub import find
from .known import know
from .limits import bounded
from .opened import CONFIG, Checkpoint, open_checkpoint
from .plan import make_plan
from .releases import ALL, Scope, beside, build_of, scope_of
from .report import (
    UNREADABLE,
    Report,
    error_json,
    make_console,
    printable,
    show,
    to_json,
)
from .verdicts import judge


def check(
    folder: Path,
    files: Files | None = None,
    ask: bool = False,
    scope: Scope = ALL,
) -> Report:
    """The report about a checkpoint, from its headers, for the vLLMs in `scope`; `ask`:
    from what the model of the installed vLLM makes of it, too. Raises
    CheckpointError."""
    with bounded(folder):
        checkpoint = open_checkpoint(folder, files)
    looked = None
    if ask and checkpoint.export is not None:
        looked = _ask(folder, files, checkpoint)
    with bounded(folder):
        known = know(checkpoint, looked, scope)
        plan = make_plan(checkpoint, known)
        return Report(checkpoint, plan, judge(checkpoint, known, None, scope), known)


def _ask(folder: Path, files: Files | None, checkpoint: Checkpoint) -> DryRun:
    """What the installed vLLM's model makes of it, in a process of its own."""
    question = [(folder, checkpoint.tensors)]
    if files is None:
        [looked] = dry_run(question)
        return looked
    # Of a repository elsewhere, the config alone.
    with tempfile.TemporaryDirectory() as here:
        text = json.dumps(checkpoint.model)
        Path(here, CONFIG).write_text(text)
        [looked] = dry_run([(Path(here), checkpoint.tensors)])
        return looked


def has_model() -> bool:
    """Whether a whole vLLM runs this, and not these files alone."""
    return getattr(sys.modules.get("vllm"), "__file__", None) is not None


@contextlib.contextmanager
def _progress(what: str) -> Generator[Callable[[int, int], None], None, None]:
    """A bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = "{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def look_deep(
    report: Report, reference: Path | None = None, plot: Path | None = None
) -> Report:
    """The report with what the tensors of a folder say. Raises CheckpointError."""
    # Headers need neither numpy nor matplotlib.
    from .deep.find import deep_findings

    checkpoint = report.checkpoint
    if report.known is None:
        remedy = "leave out --deep: other formats are not looked into"
        raise misfit(checkpoint.name, "a Quark INT8 checkpoint", "another", remedy)
    with _progress("reading") as progress:
        found = deep_findings(report.known, reference, progress)
    if plot is not None:
        from .plot import write_histogram

        write_histogram(found.modules, plot, checkpoint.name)
    scope = report.judgement.scope
    judgement = judge(checkpoint, report.known, found.findings, scope)
    return replace(report, judgement=judgement, deep=found.to_json())


def fix(report: Report, folder: Path, out: Path, layout: str | None) -> Report:
    """Write the checkpoint anew; the report about what was written. Raises
    CheckpointError and ValueError."""
    from .fix import planned, rewrite

    targets: dict[str, planned.Target] = {each: each for each in planned.TARGETS}
    target = targets[layout] if layout else None
    with _progress("writing") as progress:
        written = rewrite.rewrite(folder, out, target, progress)
    done: dict[str, Any] = {
        "folder": str(written.folder),
        "layout": written.target,
        "changes": list(written.changes),
        "written": written.written,
        "linked": written.linked,
    }
    written_report = check(out, scope=report.judgement.scope)
    return replace(written_report, deep=report.deep, fix=done)


def _scope(version: str | None, beside_vllm: str) -> tuple[Scope, bool]:
    """What verdicts are about, and whether the installed vLLM's model tells of it.
    Raises ValueError."""
    if version is None:
        return beside(beside_vllm, has_model()) if beside_vllm else ALL, True
    scope = scope_of(version)
    build = build_of(beside_vllm) if beside_vllm else None
    return scope, build is not None and build.release == scope.base


def _report(args: argparse.Namespace) -> Report:
    vllm = installed()
    version = "" if vllm is None else vllm.version
    scope, is_told = _scope(args.vllm, version)
    folder, files = find(args.model, args.revision)
    is_deep = args.deep or args.reference is not None
    if files is not None and (is_deep or args.fix):
        remedy = "download it and give the folder"
        raise misfit(args.model, "a folder for --deep and --fix", "owner/name", remedy)
    if args.plot and not args.reference:
        remedy = "give the float model with --reference"
        raise misfit("--plot", "a reference to compare with", "none", remedy)
    ask = has_model() and not args.no_model and is_told
    report = check(folder, files, ask, scope)
    if is_deep:
        report = look_deep(report, args.reference, args.plot)
    if args.fix:
        report = fix(report, folder, args.fix, args.fix_layout)
    return replace(report, vllm=args.vllm or "", installed=version)


def run(args: argparse.Namespace) -> int:
    """Print the report that the arguments ask for; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names may have characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = make_console()
    try:
        report = _report(args)
    except (CheckpointError, ValueError) as error:
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
