"""Checkpoints that a kill, a full disk or a vanished Drive cannot spoil.

A checkpoint is written into a hidden folder, flushed to the disk, listed with sizes and checksums
in a manifest, and then renamed into place. Renaming is atomic within one file system, so a folder
called checkpoint-N is either whole or not there. Where one is replaced, the old one steps aside
first; a kill between the two renames leaves both aside, and whoever looks next, a resume or a save,
finishes the second rename (`finish_replacement`). So at every moment a whole one can be found.

Not modelled: two runs that save into the same folder at once, disks that lie about fsync.

Source: POSIX rename(2) and fsync(2).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fitcast.units import Said, refusal, show_bytes

MANIFEST = "manifest.json"
STAGING = ".saving"  # unfinished checkpoints, and old ones on their way out
PREFIX = "checkpoint-"
ASIDE = "replaced-"  # in front of a checkpoint's name while a new one takes its place
KEEP = 2
OLDER = "resume from an older checkpoint, or delete this one"
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
    folder = target.parent / STAGING / target.name
    try:
        _tidy(target.parent)
        folder.mkdir(parents=True)
        yield folder
        _seal(folder, facts)
        _put_in_place(folder, target)
    except Exception as error:  # torch, safetensors and json each report a full disk differently
        with contextlib.suppress(OSError):
            _tidy(target.parent)
        last = find_last(target.parent, say=lambda _: None)
        raise SaveError(
            f"{target.name} was not written: {_cause(error)} "
            f"({_free(target.parent)} free on that disk). The last whole checkpoint is "
            f"{last.name if last else 'none yet'}. Free some space; the next save tries"
            f" again."
        ) from error
    with contextlib.suppress(OSError):  # it stands; what is left is tidying, and a power cut
        _flush(target.parent)
        _tidy(target.parent)


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename a sealed folder to `target`; what is there steps aside, and back after an error."""
    aside = folder.parent / f"{ASIDE}{target.name}"
    if target.exists():
        target.rename(aside)
    try:
        folder.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise


def finish_replacement(folder: Path) -> None:
    """Put a checkpoint in place whose save was killed after the old one had stepped aside.

    The new one, which was whole before that; the old one should the new one be damaged.

    Args:
        folder: Of the checkpoints.

    Raises:
        OSError: It cannot be renamed; nothing is lost, the next call tries again.
    """
    staging = folder / STAGING
    for aside in staging.glob(f"{ASIDE}{PREFIX}*"):
        name = aside.name.removeprefix(ASIDE)
        if not (folder / name).exists():
            new = staging / name
            (new if _is_whole(new) else aside).rename(folder / name)


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except (ValueError, OSError):
        return False
    return True


def _tidy(folder: Path) -> None:
    """Remove what saves and deletions left half done, but nothing that is the only whole copy."""
    finish_replacement(folder)
    if (folder / STAGING).exists():
        shutil.rmtree(folder / STAGING)


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

    Args:
        checkpoint: .../checkpoint-N.

    Returns:
        The facts that it was saved with, and "files": bytes and sha256 of each.

    Raises:
        FileNotFoundError: No such folder, no manifest, or a file is missing.
        ValueError: The manifest or a file is damaged.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise _missing(
            f"be a folder with a {MANIFEST}", checkpoint, ", which is missing or half written"
        )
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        listed = {name: (one["bytes"], one["sha256"]) for name, one in facts["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        got = Said(f"{manifest} ({error!r})")
        raise refusal(MANIFEST, "be JSON with a list of files", got, OLDER) from error
    for name, (n_bytes, checksum) in listed.items():
        path = checkpoint / name
        if not path.is_file():
            raise _missing(f"hold {name}", checkpoint, " without it")
        found = _fingerprint(path)
        if found != {"bytes": n_bytes, "sha256": checksum}:
            raise refusal(
                name,
                f"have {n_bytes} bytes and the checksum of its manifest",
                Said(f"{found['bytes']} bytes in {path}"),
                OLDER,
            )
    return facts


def _missing(rule: str, checkpoint: Path, how: str) -> FileNotFoundError:
    return FileNotFoundError(str(refusal("checkpoint", rule, Said(f"{checkpoint}{how}"), OLDER)))


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written: N of checkpoint-N.

    Example:
        >>> step_of(Path("run/checkpoint-28"))
        28
    """
    return int(checkpoint.name.removeprefix(PREFIX))


def _newest_first(folder: Path) -> list[Path]:
    found = (p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal())
    return sorted(found, key=step_of, reverse=True)


def find_last(*folders: str | Path | None, say: Callable[[str], object] = print) -> Path | None:
    """The whole checkpoint with the most steps in any of the folders, or `None`.

    Says what it passes over: the half-written, the damaged, a folder that cannot be read. Finishes
    a replacement that was killed.

    Args:
        folders: Where checkpoints are; `None` is no folder.
        say: Called with a sentence for each thing that is passed over.
    """
    candidates = []
    for folder in map(Path, filter(None, folders)):
        try:
            with contextlib.suppress(OSError):  # it may be read-only, or another process faster
                finish_replacement(folder)
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

    Args:
        newest: The one just written, .../checkpoint-N.
        keep: How many are kept, `newest` among them.

    Raises:
        OSError: One cannot be deleted.
    """
    staging = newest.parent / STAGING
    earlier = [p for p in _newest_first(newest.parent) if step_of(p) < step_of(newest)]
    for old in earlier[keep - 1 :]:
        staging.mkdir(exist_ok=True)
        old.rename(staging / f"old-{old.name}")
    _tidy(newest.parent)


def on_drive(folder: str) -> Path | None:
    """A folder of the Google Drive that is mounted on Colab, or `None` when none is.

    Args:
        folder: Its name below MyDrive; it need not be there.
    """
    return MOUNTED_DRIVE / folder if MOUNTED_DRIVE.is_dir() else None


def mirror(checkpoint: Path, drive: Path) -> bool:
    """Copy a checkpoint to a mounted Drive, whole or not at all; a Drive that fails only warns.

    Args:
        checkpoint: A whole one, .../checkpoint-N.
        drive: Folder of its copies; only its parent has to be there.

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
