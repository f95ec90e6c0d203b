# SPDX-License-Identifier: Apache-2.0
"""The docs are as they say, and tools/docs_check.py sees it where one is not."""

import json
from pathlib import Path

import pytest

from examples import demo_picture
from tools import docs_check
from tools.docs_check import (
    MAX_CELL,
    MAX_LINES,
    broken_links,
    look_up,
    readme_faults,
    slug,
    unknown_commands,
    unknown_numbers,
    unnamed,
    value_of,
    wrong_figures,
)
from tools.table import sizes, total, with_sizes
from tools.upstream import release

RESULTS = {
    "date": "2026-11-29",
    "fork": {"3key": {"exact": 1.0, "error": 0.02611}},
    "rows": [
        {"tokens": 1, "stock_us": 45.328, "ours_us": 41.189},
        {"tokens": 64, "stock_us": 861.9, "ours_us": 829.6},
    ],
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "other.md").write_text("# A heading, with `code`\n")
    return tmp_path / "page.md"


def test_docs_are_as_they_say():
    assert list(docs_check.faults()) == []


def test_the_demos_picture_is_that_of_the_stored_figures():
    assert demo_picture.PICTURE.read_text() == demo_picture.draw(demo_picture.FIGURES)


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("[x](other.md)", ""),
        ("[x](other.md#a-heading-with-code)", ""),
        ("[x](https://example.com/nothing)", ""),
        ("```\n[x](nothing.md)\n```", ""),
        ("[x](nothing.md)", "there is no nothing.md"),
        ("[x](other.md#another)", "other.md has no such heading"),
        ("[x](#nowhere)", "page.md has no such heading"),
        ("text [x]\n\n[x]: nothing.md\n", "there is no nothing.md"),
    ],
)
def test_links(page: Path, link: str, fault: str):
    page.write_text(f"# Page\n\n{link}\n")
    found = list(broken_links(page, page.parent))
    assert [fault in each for each in found] == [True] * bool(fault)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`make lint docs-check`", ""),
        ('    make mails GROUPS="fix kernels"   # a comment: make nothing', ""),
        ("    VLLM_BASE_VERSION=0.32.0 make ask", ""),
        ("one may make nothing of it", ""),
        ("`python -m tools.docs_check`", ""),
        ("`tests/tools` and `docs/results/stress-<chip>.json`", ""),
        ("`vllm quark-check X --deep --vllm 0.32.0`", ""),
        ("`vllm/entrypoints/llm.py` is upstream's", ""),
        ("`make nothing`", "`make nothing`"),
        ("    cd x && make lint nothing", "`make nothing`"),
        ("`python -m tools.nothing`", "`python -m tools.nothing`"),
        ("`vllm nothing`", "`vllm nothing`"),
        ("`vllm quark-check X --depth`", "`quark-check --depth`"),
        ("`tools/nothing.py`", "`tools/nothing.py`"),
        ("    python benchmarks/nothing.py", "`benchmarks/nothing.py`"),
    ],
)
def test_commands(page: Path, text: str, fault: str):
    page.write_text(f"{text}\n")
    found = list(unknown_commands(page))
    assert [fault in each for each in found] == [True] * bool(fault)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("fork.3key.exact", 1.0),
        ("rows[1].tokens", 64),
        ("rows[tokens=64].ours_us", 829.6),
        ("rows[tokens=1,ours_us=41.189].stock_us", 45.328),
    ],
)
def test_paths(path: str, value: float):
    assert look_up(RESULTS, path) == value


def test_a_path_to_no_one_row():
    for path in ("rows[tokens=2].ours_us", "nothing", "rows[7].tokens"):
        with pytest.raises((KeyError, IndexError)):
            look_up(RESULTS, path)


def test_quotients_and_products():
    assert value_of(RESULTS, "rows[1].stock_us / rows[1].ours_us") == 861.9 / 829.6
    assert value_of(RESULTS, "fork.3key.exact * 200") == 200
    assert value_of(RESULTS, "rows[1].tokens - rows[0].tokens") == 63
    assert value_of(RESULTS, "rows[1].tokens + rows[0].tokens") == 65


@pytest.mark.parametrize(
    ("figure", "fault"),
    [
        ("0.026 = fork.3key.error", ""),
        ("200 of 200 = fork.3key.exact * 200", ""),
        ("1.10x = rows[tokens=1].stock_us / rows[tokens=1].ours_us", ""),
        ("0.027 = fork.3key.error", "has 0.02611"),
        ("1.11x = rows[tokens=1].stock_us / rows[tokens=1].ours_us", "has 1.10"),
        ("0.03 = fork.3key.error", "does not say it"),
        ("0.026 = fork.4key.error", "has no fork.4key.error"),
    ],
)
def test_figures(page: Path, figure: str, fault: str):
    text = "It says 0.026, 0.027, 200 of 200, 1.10x and 1.11x."
    page.write_text(f"{text}\n\n<!-- figures: results.json\n{figure}\n-->\n")
    found = list(wrong_figures(page, page.parent))
    assert [fault in each for each in found] == [True] * bool(fault)


@pytest.mark.parametrize(
    ("row", "unknown"),
    [
        ("| 7 | 41 | 45 (1.10) | 862 |", []),
        ("| x | 41.19, **45.3** | 830 |", []),
        ("| x | 42 | 45 (1.11) |", ["42", "1.11"]),
        ("| x | 850 | 860 |", ["850"]),  # of 829.6 and 861.9, rounded to tens
    ],
)
def test_tables(page: Path, row: str, unknown: list[str]):
    comment = "<!-- table: results.json stock_us/ours_us -->"
    page.write_text(f"| a | b | c |\n|---|---|---|\n{row}\n\n{comment}\n")
    found = [
        each.split("no ")[1].split()[0] for each in unknown_numbers(page, page.parent)
    ]
    assert found == unknown


def test_a_file_that_is_not_there(page: Path):
    page.write_text(
        "1\n\n<!-- figures: x.json\n1 = a\n-->\n\n| a |\n|---|\n| 1 |\n\n"
        "<!-- table: y.json -->\n"
    )
    assert "x.json" in next(wrong_figures(page, page.parent))
    assert "y.json" in next(unknown_numbers(page, page.parent))


def test_readme_has_limits():
    groups = sizes(release().series)
    rows = "".join(f"| `{group}` | {size} |\n" for group, size in groups.items())
    rows += f"{total(groups.values())}\n"
    fill = "\n" * (MAX_LINES - len(groups) - 2)
    whole = f"{rows}| {'x' * MAX_CELL} | `a \\| b` |\n{fill}"
    assert list(readme_faults(whole)) == []
    [fault] = readme_faults(f"{whole}\n")
    assert f"at most {MAX_LINES} lines, found {MAX_LINES + 1}" in fault
    [fault] = readme_faults(f"| {'x' * (MAX_CELL + 1)} | |\n{rows}")
    assert f"line 1: expected cells of at most {MAX_CELL}" in fault


def test_readme_tells_sizes_of_groups():
    groups = sizes(release().series)
    rows = "".join(f"| `{group}` | {size} |\n" for group, size in groups.items())
    rows += f"{total(groups.values())} of Python\n"
    [fault] = readme_faults(rows.replace(" patches hook", "0 patches hook"))
    assert f"expected {total(groups.values())}" in fault
    other = rows.replace(str(groups["fix"]), "3 patches, 54 lines")
    [fault] = readme_faults(other)
    assert "the group fix" in fault and "found 3 patches, 54 lines" in fault
    other = other.replace(" patches hook", "0 patches hook")
    assert with_sizes(other, release().series) == rows


def test_pages_name_what_upstream_toml_has(tmp_path: Path):
    """A release more makes them say so, and one that only begins alike is none."""
    for page in ("README.md", "docs/status.md", "docs/guide/cherry-pick.md"):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        text = (docs_check.ROOT / page).read_text()
        (tmp_path / page).write_text(text.replace("0.32.0", "0.32.01"))
    named = [fault.partition(" of ")[0] for fault in unnamed(tmp_path)]
    assert named == ["docs/status.md: 0.32.0", "docs/guide/cherry-pick.md: 0.32.0"]


def test_anchors_are_githubs():
    assert (
        slug("`vllm serve`: what it *does*, and why")
        == "vllm-serve-what-it-does-and-why"
    )
    assert slug("v0.20: vLLM 0.20.0, 0.21.0") == "v020-vllm-0200-0210"
    assert slug("a [link](x.md) in it") == "a-link-in-it"
