# SPDX-License-Identifier: Apache-2.0
"""Draw what `make demo` shows, from figures that it wrote.

    python -m examples.demo_picture [docs/results/demo-cpu.json]

Writes docs/images/demo.svg; a test sees that it is that of the stored figures.
"""

import io
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from examples.quark_check_pictures import IMAGES, NOT_OURS
from examples.quark_int8_demo import table_of
from tools.upstream import ROOT

FIGURES, PICTURE = ROOT / "docs/results/demo-cpu.json", IMAGES / "demo.svg"
WIDTH = 84  # columns


def draw(figures: Path) -> str:
    """The demo's table, as a picture."""
    results = json.loads(figures.read_text())
    exact_match = results.pop("exact_match")
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True)
    console.print(table_of(results, exact_match))
    picture = console.export_svg(
        title="make demo", theme=DEFAULT_TERMINAL_THEME, unique_id="demo"
    )
    return NOT_OURS.sub("", picture)


def main() -> None:
    PICTURE.write_text(draw(Path(sys.argv[1]) if sys.argv[1:] else FIGURES))
    print(PICTURE)


if __name__ == "__main__":
    main()
