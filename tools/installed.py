# SPDX-License-Identifier: Apache-2.0
"""A base wheel made out of the vLLM that is installed here, by its RECORD.

A container has vLLM unpacked, whoever built it. RECORD, in the distribution's
.dist-info, names each file that came with its wheel and the file's hash; so the wheel's
files can be told from those that pip, Python or somebody else put there, and be seen to
be unchanged.
"""

import base64
import csv
import hashlib
import json
import os
import platform
import site
import sys
import tempfile
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePosixPath
from zipfile import ZIP_DEFLATED, ZipInfo

from packaging.tags import parse_tag, sys_tags
from packaging.utils import canonicalize_name
from packaging.version import Version
from wheel.wheelfile import WheelFile

from tools.download import cache_folder, locked
from tools.errors import ForkError
from tools.location import VARIABLE
from tools.repack import RECORD_OF_BUILD
from tools.target import site_folders
from tools.upstream import BASE_NAMES, BaseWheel, fork_table, label_of, release

INSTALLED = "installed"  # what VARIABLE says
# What pip and uv add to a .dist-info.
OF_INSTALLERS = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json", "uv_cache.json"}
DATE = (1980, 1, 1, 0, 0, 0)  # installing loses the wheel's; two builds are the same
INSTEAD = (
    "Start from a fresh container or environment that holds the release, or set "
    f"{VARIABLE} to a wheel of it (docs/guide/rocm.md)."
)


@dataclass(frozen=True)
class Found:
    """The installed distribution: `name` as it names itself, `info` its .dist-info."""

    name: str
    version: Version
    folder: Path
    info: str
    dist: Distribution

    def __str__(self) -> str:
        return f"{self.name} {self.version} in {self.folder}"

    def text(self, name: str) -> str:
        return self.dist.read_text(name) or ""


def folders() -> list[Path]:
    """Where packages are: this environment's, then those of the Python it stands on.

    An isolated build hides both from `import`, but not from sysconfig and site.
    """
    named = [*site_folders(), *site.getsitepackages([sys.prefix, sys.base_prefix])]
    return list(dict.fromkeys(Path(name) for name in named))


def find() -> Found:
    """The vLLM that is installed, of any name, if it can be a base. Raises
    ForkError."""
    every = [found for folder in folders() for found in _in(folder)]
    if not every:
        raise ForkError(
            f"{VARIABLE}={INSTALLED}: expected vLLM to be installed, found none in "
            f"{', '.join(map(str, folders()))}. A tool that builds in an environment "
            "of its own (uv, build) hides another environment: use `pip install`, or "
            "that tool without isolation."
        )
    bases = [found for found in every if not _is_fork(found)]
    if not bases:
        raise ForkError(
            f"{every[0]} is this fork already. {INSTEAD} A build that made its base so "
            f"has left that in {cache_folder() / INSTALLED}."
        )
    beside = [found for found in every if found.folder == bases[0].folder]
    if len(beside) > 1:
        raise ForkError(
            f"{' and '.join(map(str, beside))} are both installed, one over the "
            f"other's files. {INSTEAD}"
        )
    _check_wheel_made(bases[0])
    return bases[0]


def installed_wheel(found: Found, target: str) -> BaseWheel:
    """Describe the wheel that `make_base` makes of it. Raises ForkError."""
    base_release = release(found.version.public)
    label = label_of(found.name, found.version)
    if label not in (None, target) or (label is None and target == "cpu"):
        raise ForkError(
            f"{found} is a build for {label or 'GPUs'}, but the target is {target}. "
            f"Set VLLM_TARGET_DEVICE={label or 'cuda'}, or take another environment."
        )
    stem = found.info.removesuffix(".dist-info")
    listed = base_release.wheels.get(target, {})
    for filename in listed:
        # The released wheel: its tags are those of its name, not those inside.
        if filename.startswith(f"{stem}-") and platform.machine() in filename:
            return BaseWheel(filename, None, base_release, target)
    return BaseWheel(f"{stem}-{_tags(found)}.whl", None, base_release, target)


def make_base(found: Found, wheel: BaseWheel) -> Path:
    """Write the wheel to the cache, if it is not there, and return its path.

    It is kept, so that one can go back to it. Raises ForkError where the installed
    files are not those that RECORD names.
    """
    files = check_files(found)
    key = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:12]
    path = cache_folder() / INSTALLED / key / wheel.filename
    with locked(path):
        if not path.exists():
            _write(found, files, path)
    return path


def check_files(found: Found) -> dict[str, str]:
    """See that the files are as RECORD has them: name in a wheel to hash.

    Files that an installer or Python made are left out, scripts of entry points too:
    each installation makes its own. Raises ForkError and names what is not as it was.
    """
    files: dict[str, str] = {}
    wrong: dict[str, list[str]] = {}
    scripts = _scripts(found)
    for name, recorded in _rows(found):
        path = PurePosixPath(name)
        if path.suffix == ".pyc" or (
            path.parent.name == found.info and path.name in OF_INSTALLERS
        ):
            continue
        if path.is_absolute() or ".." in path.parts:
            if path.name not in scripts:
                wrong.setdefault("outside of the package's folder", []).append(name)
            continue
        if not recorded:
            wrong.setdefault("without a hash in RECORD", []).append(name)
        elif not (found.folder / name).is_file():
            wrong.setdefault("missing", []).append(name)
        elif _hash(found.folder / name, recorded) != recorded:
            wrong.setdefault("changed since", []).append(name)
        files[name] = recorded
    if wrong:
        said = "; ".join(f"{kind}: {_some(names)}" for kind, names in wrong.items())
        raise ForkError(
            f"{found} is not what was installed: expected the files and hashes of "
            f"{found.info}/RECORD, found {said}. {INSTEAD}"
        )
    return files


def _in(folder: Path) -> Iterator[Found]:
    """Distributions in a folder that hold the package vllm, or are named like it."""
    for dist in distributions(path=[str(folder)]):
        name = dist.metadata["Name"] or ""
        record = dist.read_text("RECORD") or ""
        if (
            canonicalize_name(name) in BASE_NAMES
            or "\nvllm/__init__.py," in f"\n{record}"
        ):
            info = Path(str(getattr(dist, "_path", ""))).name
            yield Found(name, Version(dist.version), folder, info, dist)


def _is_fork(found: Found) -> bool:
    """This fork, of this version or another."""
    ours = fork_table()["local_version"].rstrip("0123456789")
    return bool(found.text(RECORD_OF_BUILD)) or (found.version.local or "").startswith(
        ours
    )


def _check_wheel_made(found: Found) -> None:
    """See that a wheel was installed, not a link to a checkout. Raises ForkError."""
    origin = json.loads(found.text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        raise ForkError(
            f"{found} is an editable install of {origin.get('url')}: its files are "
            "there, and no RECORD names them. Apply the patches there with `git am` "
            f"(make mails), or build a wheel of it and set {VARIABLE} to that."
        )
    for name in ("RECORD", "WHEEL"):
        if not found.text(name):
            raise ForkError(
                f"{found}: expected {name} in {found.info}, found none: it was not "
                f"installed from a wheel. {INSTEAD}"
            )


def _rows(found: Found) -> Iterator[tuple[str, str]]:
    """Name and hash of each line of RECORD."""
    for row in csv.reader(found.text("RECORD").splitlines()):
        if row:
            yield row[0], row[1] if len(row) > 1 else ""


def _scripts(found: Found) -> set[str]:
    parser = ConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(found.text("entry_points.txt"))
    kinds = ("console_scripts", "gui_scripts")
    return {name for kind in kinds if kind in parser for name in parser[kind]}


def _hash(path: Path, recorded: str) -> str:
    """As RECORD writes it: algorithm=digest, in the alphabet of URLs, unpadded."""
    algorithm = recorded.partition("=")[0]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).digest()
    return f"{algorithm}={base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more


def _tags(found: Found) -> str:
    """Tags that pip takes here: those inside the wheel, if they are such.

    It runs here, whatever it says: upstream leaves tags of another Python inside.
    """
    lines = found.text("WHEEL").splitlines()
    inside = [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")]
    supported = list(sys_tags())
    fitting = [tag for tag in inside if not parse_tag(tag).isdisjoint(supported)]
    return fitting[0] if fitting else str(supported[0])


def _write(found: Found, files: dict[str, str], path: Path) -> None:
    # WheelFile dates RECORD by this variable alone.
    os.environ["SOURCE_DATE_EPOCH"] = "315532800"
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
            half_made = Path(folder) / path.name
            with WheelFile(half_made, "w") as wheel:
                # As wheels have it: .dist-info last, and RECORD at its end.
                for name in sorted(files, key=lambda name: (found.info in name, name)):
                    source = found.folder / name
                    info = ZipInfo(name, DATE)
                    info.compress_type = ZIP_DEFLATED
                    mode = 0o755 if source.stat().st_mode & 0o100 else 0o644
                    info.external_attr = (0o100000 | mode) << 16
                    wheel.writestr(info, source.read_bytes())
            half_made.replace(path)
    except OSError as error:
        raise ForkError(
            f"{path}: cannot write the base wheel: {error.strerror}. Make room or set "
            "VLLM_CACHE_ROOT to another folder."
        ) from None
