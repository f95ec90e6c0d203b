# SPDX-License-Identifier: Apache-2.0
"""See that what the docs say is so.

    python -m tools.docs_check

- Links: a file or a heading of this repository that a page links to is there.
- Commands: make's targets, modules after `python -m`, commands of vllm, options of
  quark-check and paths that a page names exist.
- Figures: a comment below a text names the JSON file that its figures come from,

      <!-- figures: docs/results/demo-cpu.json
      0.026 = fork.3key.mean_abs_dlogprob
      1.50x = rows[batch=64,metric=tokens/s].fork / rows[batch=64,metric=tokens/s].stock
      -->

  a line for each: what the text says, and where the file has it. The text must be on
  the page above the comment. The file's number, rounded to as many digits, must be it.
- Tables of figures: below a table

      <!-- table: benchmarks/results/NVIDIA_H200/router.json upstream_us/ours_us -->

  Each number of its rows, but for those in the first column, is one of the file, 100
  times one, or the quotient of two keys that an object there has.
- README: at most 140 lines, no cell of a table over 120 characters; sizes of groups.
- patches/README.md is what the patches say. README names every series, docs/status.md
  and docs/guide/cherry-pick.md every release of UPSTREAM.toml.
"""

import json
import operator
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.table import README, TABLE, sizes, table, total
from tools.upstream import ROOT, release, releases, series_folders

MAX_LINES, MAX_CELL = 140, 120
QUARK_CHECK = ROOT / "vllm/model_executor/layers/quantization/quark/quark_check/cli.py"
# Commands of vLLM 0.20.2's own, and the fork's.
VLLM_COMMANDS = {"serve", "bench", "chat", "complete", "collect-env", "run-batch"}
VLLM_COMMANDS |= {"quark-check"}
# Folders of ours whose paths are looked up where a page names one.
FOLDERS = "benchmarks|docs|examples|patches|tests|tools|vllm"
# Modules that a page may run though they are not ours.
OTHER_MODULES = {"build", "pip", "pytest", "venv", "wheel"}

LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FIGURES = re.compile(r"<!-- figures: (\S+)\n(.*?)-->", re.DOTALL)
TABLE_OF = re.compile(r"((?:^\|.*\n)+)\n?<!-- table: (\S+)((?: \S+)*) -->", re.M)
NUMBER = re.compile(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?![\d,]*\d)")
STEP = re.compile(r"([^.\[\]]+)|\[([^\]]+)\]|\.")
MAKE = re.compile(
    r'(?:^|&& |; )(?:[A-Z_]+=\S+ )*make((?: [A-Z_]+=(?:"[^"]*"|\S+)| [a-z-]+)+)'
)
PATH = re.compile(rf"(?<![\w/.<>-])((?:{FOLDERS})/[\w./-]*\w/?)(\S*)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)|^ {4,}(\S.*)$", re.MULTILINE)


def pages(root: Path = ROOT) -> list[Path]:
    """The Markdown files that git has, or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return [root / name for name in said.stdout.split() if (root / name).exists()]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: str) -> set[str]:
    return {slug(heading) for heading in HEADING.findall(FENCED.sub("", page))}


def broken_links(path: Path, root: Path = ROOT) -> Iterator[str]:
    text = FENCED.sub("", path.read_text())
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            yield f"link to {link}: there is no {name}"
        elif anchor and anchor not in anchors(target.read_text()):
            yield f"link to {link}: {target.relative_to(root)} has no such heading"


def code_of(text: str) -> Iterator[str]:
    """Everything on a page that is set as code, a line at a time."""
    for match in CODE.finditer(text):
        yield match[1] or match[2]
    for block in FENCED.findall(text):
        yield from block.splitlines()[1:-1]


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))


def _module_exists(name: str) -> bool:
    if name.partition(".")[0] in OTHER_MODULES:
        return True
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def unknown_commands(path: Path) -> Iterator[str]:
    if path.name == "PULL_REQUEST.md":  # about upstream's tree
        return
    targets = make_targets()
    options = set(re.findall(r'"(--[a-z-]+)"', QUARK_CHECK.read_text()))
    for code in code_of(path.read_text()):
        code = code.partition("  #")[0]
        for words in MAKE.findall(code):
            for word in re.sub(r'="[^"]*"', "=", words).split():
                if "=" not in word and word not in targets:
                    yield f"`make {word}`: the Makefile has no such target"
        for name in re.findall(r"python3? -m ([\w.]+)", code):
            if not _module_exists(name):
                yield f"`python -m {name}`: there is no such module"
        for name in re.findall(r"(?:^|\s|bin/)vllm ([a-z][a-z-]+)", code):
            if name not in VLLM_COMMANDS:
                yield f"`vllm {name}`: vLLM has no such command"
        if found := re.search(r"(?:vllm quark-check|quark/quark_check) (.+)", code):
            for option in re.findall(r"(?<!\S)--[a-z-]+", found[1]):
                if option not in options:
                    yield f"`quark-check {option}`: it has no such option"
        for name, rest in PATH.findall(code):
            # An edge of a pattern, or a placeholder.
            if re.search(r"[*<{=]|\.\.$", rest) or re.search("NNN|vX|vOLD|X.Y", name):
                continue
            if not (ROOT / name).exists() and not _is_upstream(name):
                yield f"`{name}`: there is no such file"


def _is_upstream(name: str) -> bool:
    """Whether a path may be a file of vLLM itself, which is not in this repository."""
    return name.startswith("vllm/") and not name.startswith("vllm/model_executor/")


def look_up(data: Any, path: str) -> Any:
    """What is at `a.b[0][key=value,other=value].c` in JSON. Raises KeyError."""
    for name, index in STEP.findall(path.strip()):
        if name:
            data = data[name]
        elif re.fullmatch(r"-?\d+", index):
            data = data[int(index)]
        elif index:
            asked = dict(pair.split("=", 1) for pair in index.split(","))
            rows = [
                row
                for row in data
                if all(str(row.get(key)) == value for key, value in asked.items())
            ]
            if len(rows) != 1:
                raise KeyError(f"[{index}] names {len(rows)} rows")
            [data] = rows
    return data


def value_of(data: Any, expression: str) -> float:
    """A number of JSON: a path, a number, or two of these with a sign between."""
    for sign, apply in OPERATIONS.items():
        left, found, right = expression.partition(f" {sign} ")
        if found:
            return apply(value_of(data, left), value_of(data, right))
    if re.fullmatch(r"\s*[\d.]+\s*", expression):
        return float(expression)
    return float(look_up(data, expression))


OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def wrong_figures(path: Path, root: Path = ROOT) -> Iterator[str]:
    page = path.read_text()
    for match in FIGURES.finditer(page):
        file, lines = match[1], match[2].strip().splitlines()
        if not (root / file).exists():
            yield f"figures of {file}: there is no such file"
            continue
        data = json.loads((root / file).read_text())
        above = re.sub(r"<!--.*?-->", "", page[: match.start()], flags=re.DOTALL)
        for line in lines:
            said, _, expression = (part.strip() for part in line.partition(" = "))
            if said not in above:
                yield f"{said}, a figure of {file}: the page does not say it above"
                continue
            try:
                found = value_of(data, expression)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                yield f"{said}: {file} has no {expression}: {error}"
                continue
            number = re.sub(r"[^\d.]", "", said.partition(" ")[0])
            digits = len(number.partition(".")[2])
            if f"{found:.{digits}f}" != number:
                yield f"{said}: {file} has {found:g} at {expression}"


def _numbers(data: Any, ratios: list[list[str]]) -> Iterator[float]:
    """All numbers of JSON, and the quotients of keys that an object has both."""
    if isinstance(data, dict):
        for above, below in ratios:
            top, bottom = data.get(above), data.get(below)
            numbers = isinstance(top, int | float) and isinstance(bottom, int | float)
            if numbers and bottom:
                yield top / bottom
        data = list(data.values())
    if isinstance(data, list):
        for each in data:
            yield from _numbers(each, ratios)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield data


def unknown_numbers(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Numbers of tables that the file named below them does not have."""
    for rows, file, more in TABLE_OF.findall(path.read_text()):
        if not (root / file).exists():
            yield f"table of {file}: there is no such file"
            continue
        ratios = [ratio.split("/") for ratio in more.split()]
        known = list(_numbers(json.loads((root / file).read_text()), ratios))
        known += [100 * each for each in known]
        by_digits: dict[int, set[str]] = {}
        for line in rows.splitlines()[2:]:
            for number in NUMBER.findall(" | ".join(cells(line)[1:])):
                plain = number.replace(",", "")
                digits = digits_of(plain)
                if digits not in by_digits:
                    by_digits[digits] = {rounded(each, digits) for each in known}
                if plain not in by_digits[digits]:
                    yield f"table of {file}: it has no {number} ({line.strip()})"


def digits_of(number: str) -> int:
    """Digits behind the point; below 0, how many digits before it are rounded off."""
    whole, _, fraction = number.partition(".")
    return len(fraction) or len(whole.rstrip("0")) - len(whole)


def rounded(value: float, digits: int) -> str:
    return f"{round(value, digits):.{max(digits, 0)}f}"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def readme_faults(text: str) -> Iterator[str]:
    lines = text.splitlines()
    if len(lines) > MAX_LINES:
        yield f"expected at most {MAX_LINES} lines, found {len(lines)}"
    for number, line in enumerate(lines, 1):
        if line.startswith("|") and (longest := max(map(len, cells(line)))) > MAX_CELL:
            yield (
                f"line {number}: expected cells of at most {MAX_CELL} characters, "
                f"found one of {longest}"
            )
    rows = {found[0]: found for line in lines if len(found := cells(line)) > 1}
    groups = sizes(release().series)
    if (whole := total(groups.values())) not in text:
        yield f"size of the stack: expected {whole}; make patches-table"
    for group, size in groups.items():
        if (said := rows.get(f"`{group}`", ["", "no row"])[1]) != str(size):
            yield (
                f"size of the group {group}: expected {size}, found {said}; make "
                "patches-table"
            )


def unnamed(root: Path = ROOT) -> Iterator[str]:
    """Series and releases that a page should name and does not."""
    series = [folder.name for folder in series_folders()]
    expected = {"README.md": series}
    for page in ("docs/status.md", "docs/guide/cherry-pick.md"):
        expected[page] = list(releases())
    for page, names in expected.items():
        text = (root / page).read_text()
        for name in names:
            if not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w]|\.\d)", text):
                yield f"{page}: {name} of UPSTREAM.toml is not named"


def faults() -> Iterator[str]:
    """Each with its page and what to look at."""
    for path in pages():
        name = path.relative_to(ROOT)
        for check in (broken_links, unknown_commands, wrong_figures, unknown_numbers):
            yield from (f"{name}: {fault}" for fault in check(path))
    yield from (f"README.md: {fault}" for fault in readme_faults(README.read_text()))
    yield from unnamed()
    if TABLE.read_text() != table():
        yield f"{TABLE.relative_to(ROOT)}: not what the patches say; make patches-table"


def main() -> None:
    found = list(faults())
    for fault in found:
        print(f"error: {fault}")
    if found:
        sys.exit(1)
    print(f"docs: {len(pages())} pages are as they say")


if __name__ == "__main__":
    main()
