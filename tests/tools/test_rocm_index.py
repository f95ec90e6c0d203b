# SPDX-License-Identifier: Apache-2.0
"""Upstream's ROCm index, as a local server that answers like one."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest

from tests.tools.conftest import make_base
from tools import rocm_index, upstream
from tools.build import base_wheel, build_wheel
from tools.errors import ForkError
from tools.upstream import Release, release

NAME = "vllm-0.20.2+rocm721-cp38-abi3-manylinux_2_28_x86_64.whl"
OTHER_PYTHON = NAME.replace("cp38-abi3", "cp399-cp399")
PAGE = "/rocm/0.20.2/rocm721/vllm/"
FILES = "/rocm/0123abcd/"
JSON = "application/vnd.pypi.simple.v1+json"


@dataclass
class Answer:
    body: bytes
    content_type: str = "text/html"
    status: int = 200
    length: int | None = None  # what Content-Length says, if not the truth


@dataclass
class Index:
    """What the server has, by path, and the paths that it was asked for."""

    url: str
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def page(self, *links: str) -> None:
        self.answers[PAGE] = Answer("\n".join(links).encode())

    def serve(self, wheel: bytes, name: str = NAME) -> str:
        """Serve a wheel; the link to it, with its sha256."""
        self.answers[FILES + name.replace("+", "%2B")] = Answer(wheel, "binary/octet")
        return link(name, sha256_of(wheel))

    @property
    def wheels_asked(self) -> list[str]:
        return [path for path in self.asked if path.endswith(".whl")]


def sha256_of(wheel: bytes) -> str:
    return hashlib.sha256(wheel).hexdigest()


def link(name: str, sha256: str | None = "0" * 64, more: str = "", to: str = "") -> str:
    """As upstream's index has them: relative, with the + escaped."""
    href = "../../../0123abcd/" + (to or name).replace("+", "%2B")
    fragment = f"#sha256={sha256}" if sha256 else ""
    return f'<a href="{href}{fragment}" {more}>{name}</a>'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        index: Index = self.server.index  # type: ignore[attr-defined]
        index.asked.append(self.path)
        found = index.answers.get(self.path, Answer(b"", status=404))
        self.send_response(found.status)
        self.send_header("Content-Type", found.content_type)
        self.send_header("Content-Length", str(found.length or len(found.body)))
        self.end_headers()
        self.wfile.write(found.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index = Index(f"http://127.0.0.1:{http.server_port}/rocm/0.20.2/rocm721/")
    http.index = index  # type: ignore[attr-defined]
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        rocm_index, "rocm_index", lambda *which: index.url if which else ""
    )
    yield index
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LOCATION", "VARIANT"):
        monkeypatch.delenv(f"VLLM_PRECOMPILED_WHEEL_{name}", raising=False)
    monkeypatch.delenv("VLLM_BASE_VERSION", raising=False)
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "rocm")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def fork(series: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small series, for a release that has a ROCm wheel."""
    having = {"0.20.2": Release("0.20.2", series, {}, ("rocm721",))}
    monkeypatch.setattr(upstream, "releases", lambda: having)
    return series


@pytest.fixture
def base_bytes(tmp_path: Path) -> bytes:
    path = make_base(tmp_path / "base", name="vllm", version="0.20.2+rocm721")
    assert path.name == NAME
    return path.read_bytes()


def refused(match: str) -> str:
    """What is said where no base wheel is found. It is said once, without a trace."""
    with pytest.raises(ForkError, match=match) as error:
        base_wheel()
    said = str(error.value)
    assert "VLLM_PRECOMPILED_WHEEL_LOCATION" in said
    assert "docs/guide/rocm.md" in said
    return said


def left(folder: Path) -> list[str]:
    """Files in the cache but locks, which stay."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if path.suffix != ".lock"]


def test_the_index_is_upstreams_own():
    assert upstream.rocm_index("0.20.2", "rocm721") == (
        "https://wheels.vllm.ai/rocm/0.20.2/rocm721/"
    )
    assert release("0.18.0").rocm_variants == ("rocm700",)
    assert release("0.20.2").rocm_variants == ("rocm721",)
    assert release("0.21.0").rocm_variants == ("rocm722",)
    assert release("0.26.0").rocm_variants == ("rocm723",)
    assert release("0.33.0").rocm_variants == ()


def test_a_wheel_is_built_from_the_index(
    index: Index, fork: Path, base_bytes: bytes, tmp_path: Path, capsys
):
    index.page(link(OTHER_PYTHON), index.serve(base_bytes), link("torch-2.11.0.whl"))
    wheel = build_wheel(tmp_path / "dist")
    assert wheel.name == f"vllm-0.20.2+quark2.rocm721-{NAME.split('-', 2)[2]}"
    with ZipFile(wheel) as archive:
        assert "line_5 = 500" in archive.read("vllm/model.py").decode()
    assert index.asked[0] == PAGE and len(index.wheels_asked) == 1
    said = capsys.readouterr().err
    assert (
        f"{sha256_of(base_bytes)}, is what the index {index.url} states today. "
        "It is not one of our pins."
    ) in said.replace("\n", " ")


def test_the_page_may_be_json(index: Index, base_bytes: bytes):
    index.serve(base_bytes)
    files = [
        {"filename": NAME, "url": f"../../../0123abcd/{NAME}", "hashes": {"sha256": h}}
        for h in [sha256_of(base_bytes).upper()]
    ]
    page = {"name": "vllm", "files": files, "meta": {"api-version": "1.0"}}
    index.answers[PAGE] = Answer(json.dumps(page).encode(), JSON)
    found = base_wheel()
    assert found.filename == NAME
    assert found.sha256 == sha256_of(base_bytes)


def test_the_last_build_that_fits_is_taken(index: Index):
    rebuilt = [NAME.replace("-cp38", f"-{n}-cp38") for n in (9, 10)]
    index.page(*map(link, [rebuilt[1], NAME, rebuilt[0]]))
    assert base_wheel().filename == rebuilt[1]


def test_another_python_is_refused_before_anything_is_downloaded(index: Index):
    index.page(link(OTHER_PYTHON))
    said = refused("expected a wheel for Python 3")
    assert OTHER_PYTHON in said
    assert index.wheels_asked == []


def test_a_variant_without_a_wheel_is_refused_without_asking(index: Index, monkeypatch):
    monkeypatch.setenv("VLLM_PRECOMPILED_WHEEL_VARIANT", "rocm600")
    refused("rocm600.*no such ROCm wheel of vLLM 0.20.2, but of rocm721")
    monkeypatch.setenv("VLLM_PRECOMPILED_WHEEL_VARIANT", "rocm721")
    index.page(link(NAME))
    assert base_wheel().filename == NAME
    assert index.asked == [PAGE]


def test_a_release_without_a_wheel_is_refused_without_asking(index: Index, monkeypatch):
    monkeypatch.setenv("VLLM_BASE_VERSION", "0.33.0")
    said = refused("no ROCm wheel of vLLM 0.33.0, but of 0.18.0, 0.19.0")
    assert "VLLM_BASE_VERSION" in said
    assert index.asked == []


@pytest.mark.parametrize(
    "name",
    [
        "vllm-0.20.1+rocm721-cp38-abi3-manylinux_2_28_x86_64.whl",
        "vllm-0.20.2+rocm722-cp38-abi3-manylinux_2_28_x86_64.whl",
        "vllm-0.20.2-cp38-abi3-manylinux_2_28_x86_64.whl",
        "vllm_omni-0.20.2+rocm721-cp38-abi3-manylinux_2_28_x86_64.whl",
        "vllm-0.20.2+rocm721.tar.gz",
        "vllm.whl",
    ],
)
def test_a_missing_wheel_is_refused_and_what_is_there_is_named(index: Index, name: str):
    index.page(link(name))
    said = refused(r"expected a wheel of vllm 0.20.2\+rocm721, found")
    assert name in said
    assert index.wheels_asked == []


def test_an_empty_page(index: Index):
    index.page()
    refused("found no files")


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (None, r"has no page of vllm \(404\)"),
        (Answer(b"", status=403), "cannot read its page of vllm: 403"),
        (Answer(b"", status=500), "cannot read its page of vllm: 500"),
        (Answer(b"PDF", "application/pdf"), "application/pdf"),
        (Answer(b"{", JSON), "cannot read its page"),
        (Answer(b"{}", JSON), "cannot read its page"),
        (Answer(b"[]", JSON), "cannot read its page"),
        (
            Answer(b'<meta name="pypi:repository-version" content="9.0">'),
            "cannot read its page of vllm: .*9.0",
        ),
    ],
)
def test_a_page_that_cannot_be_read(index: Index, answer: Answer | None, match: str):
    if answer:
        index.answers[PAGE] = answer
    said = refused(match)
    assert said.startswith(index.url)


def test_an_index_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    nobody = "http://127.0.0.1:9/rocm/"
    monkeypatch.setattr(rocm_index, "rocm_index", lambda *_: nobody)
    refused("127.0.0.1:9/rocm/: cannot read its page of vllm.*\nCheck the network")


def test_a_yanked_wheel_is_not_taken(index: Index):
    yanked = link(NAME, more='data-yanked="wrong AITER"')
    index.page(yanked)
    assert NAME in refused("withdrawn.*: wrong AITER")
    index.page(yanked, link(rebuilt := NAME.replace("-cp38", "-1-cp38")))
    assert base_wheel().filename == rebuilt
    index.page(link(NAME, more="data-yanked"))
    refused("no reason given")
    assert index.wheels_asked == []


@pytest.mark.parametrize("sha256", [None, "12ab", "0" * 63 + "g", "0" * 65])
def test_no_sha256(index: Index, sha256: str | None):
    index.page(link(NAME, sha256))
    said = refused("to state its sha256, found")
    assert f"/rocm/0123abcd/{NAME.replace('+', '%2B')} " in said
    assert index.wheels_asked == []


def test_another_hash_is_no_sha256(index: Index):
    index.page(link(NAME, None).replace("whl", f"whl#md5={'0' * 32}", 1))
    refused("to state its sha256, found .*md5")


@pytest.mark.parametrize("to", ["other.whl", NAME.replace("rocm721", "rocm722")])
def test_a_link_that_leads_to_another_file(index: Index, to: str):
    index.page(link(NAME, to=to))
    refused(r"leads to .*: the file was\s+renamed")
    assert index.wheels_asked == []


def test_a_wheel_that_was_renamed(
    index: Index, fork: Path, base_bytes: bytes, tmp_path: Path
):
    cuda = make_base(tmp_path / "cuda", name="vllm").read_bytes()
    index.page(index.serve(cuda))
    with pytest.raises(ForkError, match=r"says version 0.20.2\+rocm721, its METADATA"):
        build_wheel(tmp_path / "dist")
    assert not list((tmp_path / "dist").glob("*"))


def test_a_truncated_file(index: Index, fork: Path, base_bytes: bytes, tmp_path: Path):
    whole = index.serve(base_bytes)
    index.serve(base_bytes[:-1000])
    index.page(whole)
    with pytest.raises(ForkError, match="wrong sha256") as error:
        build_wheel(tmp_path / "dist")
    assert f"({'the index ' + index.url})" in str(error.value)
    assert left(tmp_path / "cache") == [] and not list((tmp_path / "dist").glob("*"))


def test_a_transfer_that_breaks_off(
    index: Index, fork: Path, base_bytes: bytes, tmp_path: Path
):
    index.page(index.serve(base_bytes))
    [path] = [path for path in index.answers if path.endswith(".whl")]
    index.answers[path].length = len(base_bytes) + 1000
    with pytest.raises(ForkError, match="the download broke off"):
        build_wheel(tmp_path / "dist")
    assert not [name for name in left(tmp_path / "cache") if name.endswith(".whl")]
    index.answers[path].length = None
    assert build_wheel(tmp_path / "dist").exists()
    assert left(tmp_path / "cache") == [NAME]


def test_a_wheel_that_the_server_lacks(
    index: Index, fork: Path, base_bytes: bytes, tmp_path: Path
):
    index.page(link(NAME))
    with pytest.raises(ForkError, match="broke off: 404"):
        build_wheel(tmp_path / "dist")
    assert left(tmp_path / "cache") == []


def test_what_is_in_the_cache_is_not_downloaded_again(
    index: Index, fork: Path, base_bytes: bytes, tmp_path: Path
):
    index.page(index.serve(base_bytes))
    build_wheel(tmp_path / "dist")
    build_wheel(tmp_path / "dist")
    assert len(index.wheels_asked) == 1


def test_the_libc_is_named(index: Index, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        rocm_index,
        "platform",
        SimpleNamespace(
            python_version=lambda: "3.12.4",
            machine=lambda: "x86_64",
            libc_ver=lambda: ("glibc", "2.17"),
        ),
    )
    index.page(link(NAME.replace("manylinux_2_28", "manylinux_9_99")))
    refused("Python 3.12.4 on x86_64 with glibc 2.17, found .*manylinux_9_99")
