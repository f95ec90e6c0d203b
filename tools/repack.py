# SPDX-License-Identifier: Apache-2.0
"""Write the fork's wheel: the base wheel's files, patched, with the overlay."""

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile, ZipInfo

from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from packaging.version import Version
from rich.console import Console
from rich.progress import track
from wheel.wheelfile import WheelFile

from tools.errors import ForkError
from tools.series import Patch, apply_patch, read_series, touched_files
from tools.upstream import BASE_NAMES, overlay_files, series_folders

VERSION_FILE = "vllm/_version.py"


RECORD_OF_BUILD = "quark_int8.json"  # in .dist-info; what `Plan.record` says


def overlay_of(patches: Sequence[Patch]) -> dict[str, Path]:
    """The overlay's files that the patches name: name in the package to file. Raises
    ForkError."""
    files, found = overlay_files(), {}
    for patch in patches:
        for name in patch.message.overlay:
            if name not in files:
                raise ForkError(
                    f"{patch.name}: its trailer `Overlay: {name}` names no file of the "
                    "overlay."
                )
            found[name] = files[name]
    return found


def check_named() -> None:
    """See that every file of the overlay goes along with a patch of some series. Raises
    ForkError."""
    patches = [patch for folder in series_folders() for patch in read_series(folder)]
    if orphans := sorted(overlay_files().keys() - overlay_of(patches).keys()):
        raise ForkError(
            f"no patch names {', '.join(orphans)}: add `Overlay: <file>` to the "
            "message of the patch that first uses it (make tree; make patches)."
        )


def patched_files(base: ZipFile, patches: Sequence[Patch]) -> dict[str, bytes]:
    """The files that the patches change, as they are afterwards. Raises ForkError."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        names = touched_files(patches)
        for name in set(names) & set(base.namelist()):
            base.extract(name, tree)
        for patch in patches:
            apply_patch(patch.path, tree)
        return {name: (tree / name).read_bytes() for name in names}


def repack(
    base_path: Path,
    patches: Sequence[Patch],
    version: str,
    dist_folder: Path,
    record: bytes = b"",
    names: Sequence[str] = BASE_NAMES,
) -> Path:
    """Write `dist_folder`/vllm-`version`-<tags of the base>.whl and return its path:
    the base, patched, with the overlay's files that the patches name and `record`.
    `names` are those that the base's METADATA may have.

    Binaries and every other file that the fork does not change keep their bytes and
    times, so that two builds are the same to the byte. The wheel appears under its
    name when it is complete. Raises ForkError.
    """
    tags = base_path.name.split("-", 2)[2].removesuffix(".whl").split("-")[-3:]
    filename = "-".join(["vllm", version, *tags]) + ".whl"
    dist_folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".build-", dir=dist_folder) as folder,
            ZipFile(base_path) as base,
        ):
            half_made = Path(folder) / filename
            _write(base, patches, version, half_made, record, names)
            return half_made.replace(dist_folder / filename)
    except BadZipFile as error:
        raise ForkError(f"{base_path}: not a wheel, or damaged: {error}.") from None
    except OSError as error:
        raise ForkError(
            f"{dist_folder / filename}: cannot write the wheel: {error.strerror}. "
            "Nothing was left behind; make room and build again."
        ) from None


def _write(
    base: ZipFile,
    patches: Sequence[Patch],
    version: str,
    path: Path,
    record: bytes,
    names: Sequence[str],
) -> None:
    old_info = _dist_info(base)
    new_info = f"vllm-{version}.dist-info"
    changed = patched_files(base, patches)
    changed[VERSION_FILE] = _version_file(base.read(VERSION_FILE), version)
    changed[f"{old_info}/METADATA"] = metadata(base, version, names)
    changed[f"{old_info}/WHEEL"] = _wheel_file(base, path.name)
    members = {info.filename: info for info in base.infolist() if not info.is_dir()}
    if record:
        changed[f"{old_info}/{RECORD_OF_BUILD}"] = record
    overlay = overlay_of(patches)
    if shadowed := sorted(members.keys() & overlay_files().keys()):
        raise ForkError(
            f"vllm/ may only hold files that the base lacks, but {shadowed[0]} is in "
            f"{Path(base.filename or '').name}. Change it with a patch."
        )
    added = sorted(set(changed) - set(members))
    date = members[VERSION_FILE].date_time
    # WheelFile dates RECORD by this variable alone.
    os.environ["SOURCE_DATE_EPOCH"] = "315532800"
    with WheelFile(path, "w") as wheel:
        for name in _progress([*members, *added, *overlay]):
            old = members.get(name)
            if name == f"{old_info}/RECORD":
                continue  # WheelFile writes it anew
            if name in changed:
                data = changed[name]
            else:
                data = base.read(old) if old else overlay[name].read_bytes()
            info = ZipInfo(name.replace(old_info, new_info))
            info.date_time = old.date_time if old else date
            info.compress_type = ZIP_DEFLATED
            info.external_attr = old.external_attr if old else 0o644 << 16
            wheel.writestr(info, data)


def _progress(names: Sequence[str]) -> Iterable[str]:
    console = Console(stderr=True)
    return track(names, "Writing the wheel", console=console, transient=True)


def _dist_info(base: ZipFile) -> str:
    folders = {
        name.split("/")[0]
        for name in base.namelist()
        if name.split("/")[0].endswith(".dist-info")
    }
    if len(folders) != 1:
        raise ForkError(f"{base.filename}: expected one .dist-info, found {folders}.")
    return folders.pop()


def metadata(base: ZipFile, version: str, names: Sequence[str] = BASE_NAMES) -> bytes:
    """The base's METADATA under the fork's name and version.

    A CPU base asks for `torch==<release>+cpu`, which is on PyTorch's own index alone;
    this asks for `torch==<release>`, which either build satisfies. Raises ForkError.
    """
    name = f"{_dist_info(base)}/METADATA"
    headers, separator, body = base.read(name).decode().partition("\n\n")
    lines: list[str] = []
    for line in headers.splitlines():
        key, _, value = line.partition(": ")
        if key == "Name":
            _check_base(value, base, names)
            line = "Name: vllm"
        elif key == "Version":
            _check_version(value, version, base)
            line = f"Version: {version}"
        elif key == "Requires-Dist" and "cpu" in version:
            requirement = Requirement(value)
            if requirement.name == "torch":
                pins = {Version(pin.version).public for pin in requirement.specifier}
                line = f"Requires-Dist: torch=={pins.pop()}"
        if line not in lines or key != "Requires-Dist":
            lines.append(line)
    return ("\n".join(lines) + separator + body).encode()


def _check_base(name: str, base: ZipFile, names: Sequence[str]) -> None:
    if name not in names:
        raise ForkError(
            f"{base.filename}: its METADATA names {name}; expected one of "
            f"{', '.join(names)}."
        )


def _check_version(found: str, version: str, base: ZipFile) -> None:
    expected = Version(version).public
    if Version(found).public != expected:
        raise ForkError(
            f"{base.filename}: its METADATA says version {found}, its file name "
            f"{expected}. Was the file renamed?"
        )


def _version_file(old: bytes, version: str) -> bytes:
    parsed = Version(version)
    text = old.decode()
    for name, value in (
        ("__version__ = version", version),
        ("__version_tuple__ = version_tuple", (*parsed.release, parsed.local)),
    ):
        line = f"{name} = {value!r}"
        text, count = re.subn(rf"^{name} = .*$", line, text, flags=re.M)
        if count != 1:
            raise ForkError(
                f"{VERSION_FILE}: expected one line `{name} = ...`, found {count}."
            )
    return text.encode()


def _wheel_file(base: ZipFile, filename: str) -> bytes:
    """WHEEL with the file name's tags. Upstream renames its wheels after building and
    leaves the old tags inside, which `pip check` refuses on another Python."""
    lines = base.read(f"{_dist_info(base)}/WHEEL").decode().splitlines()
    kept = [line for line in lines if line and not line.startswith(("Tag:", "Build:"))]
    tags = sorted(f"Tag: {tag}" for tag in parse_wheel_filename(filename)[3])
    return "\n".join([*kept, *tags, ""]).encode()
