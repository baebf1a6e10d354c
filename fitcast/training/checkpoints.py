"""Checkpoints that a kill, a full disk or a vanished Drive cannot spoil.

A checkpoint is written into a hidden folder, flushed to the disk, listed with sizes and checksums
in a manifest, and then renamed into place. Renaming is atomic within one file system, so a folder
called checkpoint-N is either whole or not there.

Not modelled: two runs that save into the same folder at once, disks that lie about fsync.

Source: POSIX rename(2) and fsync(2).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fitcast.units import show_bytes

MANIFEST = "manifest.json"
STAGING = ".saving"  # unfinished checkpoints, and old ones on their way out
PREFIX = "checkpoint-"
KEEP = 2
MOUNTED_DRIVE = Path("/content/drive/MyDrive")  # as google.colab.drive.mount makes it


class SaveError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


@contextlib.contextmanager
def written_whole(target: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error.

    Args:
        target: .../checkpoint-N; what is there already is replaced.
        facts: Kept in the manifest, JSON.

    Raises:
        SaveError: Writing failed, whatever the reason; `target` is as it was.
    """
    staging = target.parent / STAGING
    folder, replaced = staging / target.name, staging / "replaced"
    try:
        _remove(staging)
        folder.mkdir(parents=True)
        yield folder
        _seal(folder, facts)
        if target.exists():
            target.rename(replaced)
        try:
            folder.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    except Exception as error:  # torch, safetensors and json each report a full disk differently
        with contextlib.suppress(OSError):
            _remove(staging)
        last = find_last(target.parent, say=lambda _: None)
        raise SaveError(
            f"{target.name} was not written: {_cause(error)} "
            f"({_free(target.parent)} free on that disk). The last whole checkpoint is "
            f"{last.name if last else 'none yet'}. Free some space; the next save tries"
            f" again."
        ) from error
    with contextlib.suppress(OSError):  # it stands; what is left is tidying, and a power cut
        _flush(target.parent)
        _remove(staging)


def _cause(error: Exception) -> str:
    """The first line of an error and of the system's error behind it, where there is one."""
    chain = [error, error.__cause__ or error.__context__]
    return "; ".join(
        dict.fromkeys(
            f"{str(e).splitlines()[0] if str(e) else type(e).__name__}"
            for e in chain
            if e is not None
        )
    )


def _free(folder: Path) -> str:
    try:
        return show_bytes(shutil.disk_usage(folder).free)
    except OSError as error:
        return f"unknown, {error.strerror}:"


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file, then write the manifest: it can only list what is on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    listed = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": listed}, indent=1), encoding="utf-8")
    for path in (manifest, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder (Windows cannot flush those)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, once every file has proved to be whole.

    Raises:
        FileNotFoundError: No such folder, no manifest, or a file is missing.
        ValueError: The manifest or a file is damaged.
    """
    remedy = "resume from an older checkpoint, or delete this one"
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(
            f"checkpoint must be a folder with a {MANIFEST}, got {checkpoint}, "
            f"which is missing or half written; {remedy}"
        )
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        listed = {name: (one["bytes"], one["sha256"]) for name, one in facts["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{MANIFEST} must be JSON with a list of files, got {manifest} ({error!r}); {remedy}"
        ) from error
    for name, (n_bytes, checksum) in listed.items():
        path = checkpoint / name
        if not path.is_file():
            raise FileNotFoundError(
                f"checkpoint must hold {name}, got {checkpoint} without it; {remedy}"
            )
        if (found := _fingerprint(path)) != {"bytes": n_bytes, "sha256": checksum}:
            raise ValueError(
                f"{name} must have {n_bytes} bytes and the checksum of its "
                f"manifest, got {found['bytes']} bytes in {path}; {remedy}"
            )
    return facts


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written: N of checkpoint-N."""
    return int(checkpoint.name.removeprefix(PREFIX))


def _newest_first(folder: Path) -> list[Path]:
    found = (p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal())
    return sorted(found, key=step_of, reverse=True)


def find_last(*folders: str | Path | None, say=print) -> Path | None:
    """The whole checkpoint with the most steps in any of the folders, or `None`.

    Says what it passes over: the half-written, the damaged, a folder that cannot be read.
    """
    candidates = []
    for folder in map(Path, filter(None, folders)):
        try:
            candidates += _newest_first(folder)
            unfinished = list((folder / STAGING).glob(f"{PREFIX}*"))
        except OSError as error:
            say(f"{folder} cannot be read ({error}); going on without it.")
            continue
        for path in unfinished:
            say(f"{path.name} was being written when the last run ended: ignored.")
    for checkpoint in sorted(candidates, key=step_of, reverse=True):
        try:
            verify(checkpoint)
            return checkpoint
        except (ValueError, OSError) as error:
            say(f"{checkpoint.name} is not whole: ignored. {error}")
    return None


def prune(newest: Path, keep: int = KEEP) -> None:
    """Delete all but the `keep` last checkpoints up to `newest`; none is ever seen half deleted.

    Those with more steps than the one just written are left: they are damaged, or it would go on
    from them; the run writes over them when it gets there.
    """
    staging = newest.parent / STAGING
    earlier = [p for p in _newest_first(newest.parent) if step_of(p) < step_of(newest)]
    for old in earlier[keep - 1 :]:
        staging.mkdir(exist_ok=True)
        old.rename(staging / f"old-{old.name}")
    _remove(staging)


def on_drive(folder: str) -> Path | None:
    """A folder of the Google Drive that is mounted on Colab, or `None` when none is."""
    return MOUNTED_DRIVE / folder if MOUNTED_DRIVE.is_dir() else None


def mirror(checkpoint: Path, drive: Path) -> bool:
    """Copy a checkpoint to a mounted Drive, whole or not at all; a Drive that fails only warns.

    Returns:
        Whether the copy is there.
    """
    try:
        if not drive.parent.is_dir():  # an unmounted Drive would become a folder on this machine
            raise FileNotFoundError(f"{drive.parent} is not there")
        facts = {name: value for name, value in verify(checkpoint).items() if name != "files"}
        drive.mkdir(exist_ok=True)
        with written_whole(drive / checkpoint.name, facts) as folder:
            shutil.copytree(
                checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST)
            )
        prune(drive / checkpoint.name)
    except (OSError, ValueError) as error:  # the Drive's, or a checkpoint that is damaged here
        print(
            f"Warning: {checkpoint.name} was not copied to {drive}: {error} "
            f"It is safe in {checkpoint.parent}; training goes on."
        )
        return False
    return True
