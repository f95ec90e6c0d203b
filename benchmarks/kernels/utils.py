# SPDX-License-Identifier: Apache-2.0
"""What the kernels' benchmarks share: their command line, and where results go."""

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.report import save


def write_results(
    out: Path,
    name: str,
    rows: list[dict[str, Any]],
    plot: Callable[[dict[str, Any], Path], None],
    **about: Any,
) -> None:
    """Write <out>/<chip>/<name>.json, and beside it what `plot` makes of the result."""
    chip = torch.cuda.get_device_name().replace(" ", "_")
    date = datetime.date.today().isoformat()
    result = {"chip": chip, "date": date, **about, "rows": rows}
    path = out / chip / f"{name}.json"
    save(path, result)
    plot(result, path.with_suffix(".png"))


def measure_or_sweep(
    doc: str | None,
    tokens: list[int],
    measure: Callable[[Path, list[int]], None],
    sweep: Callable[[list[int]], None],
    tried: str,
) -> None:
    """The command: measure numbers of tokens, or with --sweep try what `tried` says."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sweep", action="store_true", help=f"try {tried}")
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, metavar="N")
    args = parser.parse_args()
    sweep(args.tokens) if args.sweep else measure(args.out, args.tokens)
