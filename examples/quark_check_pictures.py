# SPDX-License-Identifier: Apache-2.0
"""Draw what `vllm quark-check` says of the three failures of docs/measured/fix.md.

    python -m examples.quark_check_pictures

Writes docs/images/quark-check-*.svg; a test sees that they are those of this commit.
"""

import io
import re
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from vllm.model_executor.layers.quantization.quark.quark_check.report import WIDTH, show
from vllm.model_executor.layers.quantization.quark.quark_check.run import check

from tests.fixtures.cells import CELLS

IMAGES = Path(__file__).resolve().parents[1] / "docs/images"
# Patch -> the export whose report shows what it mends.
PICTURES = {
    "0001": "scales-columns",
    "0002": "int8-3key",
    "0003": "int8-per-expert",
}
# The fonts that rich would have the reader's browser fetch, and its own mark.
NOT_OURS = re.compile(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", re.DOTALL)


def draw(name: str) -> str:
    """The report about a cell, as a picture."""
    [cell] = [cell for cell in CELLS if cell.key == name]
    console = Console(
        record=True,
        file=io.StringIO(),
        width=WIDTH,
        force_terminal=True,
        highlight=False,
        markup=False,
        emoji=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        show(check(cell.write(Path(folder) / name)), console)
    picture = console.export_svg(
        title=f"vllm quark-check {name}",
        theme=DEFAULT_TERMINAL_THEME,
        unique_id=f"quark-check-{name}",
    )
    return NOT_OURS.sub("", picture)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for patch, name in PICTURES.items():
        file = IMAGES / f"quark-check-{patch}.svg"
        file.write_text(draw(name))
        print(file)


if __name__ == "__main__":
    main()
