"""Pack what students get: the last commit without `instructor/` and its tests.

    python -m instructor.release --out build/course-students.zip

The same commit gives the same bytes: names are sorted, dates and modes fixed. Changes that are not
committed are not in it.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tools.notebooks import ROOT

PRIVATE = ("instructor/", "tests/instructor/")
FOLDER = "course/"  # what the archive unpacks to
OURS = {  # by page: what leads to nowhere without the instructor's part
    "README.md": re.compile(rb"^\|.*\(instructor/.*\n", re.MULTILINE),
    "SECURITY.md": re.compile(rb"^## Students' answers\n.*?(?=^## )", re.MULTILINE | re.DOTALL),
}
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip file knows


def student_files(root: Path = ROOT) -> dict[str, tuple[bytes, bool]]:
    """Path to (content, whether it is executable), of the last commit.

    Raises:
        OSError: This is no git repository, or it has no commit, or there is no git.
    """
    files = {}
    with tarfile.open(fileobj=io.BytesIO(_git(root, "archive", "--format=tar", "HEAD"))) as archive:
        for member in archive:
            if member.isfile() and not member.name.startswith(PRIVATE):
                content = archive.extractfile(member).read()
                if member.name in OURS:
                    content = OURS[member.name].sub(b"", content)
                files[member.name] = content, bool(member.mode & 0o100)
    return files


def state(root: Path = ROOT) -> str:
    """Which commit is packed, and how much of the folder is not in it."""
    commit = _git(root, "rev-parse", "--short", "HEAD").decode().strip()
    count = len(_git(root, "status", "--porcelain", "--untracked-files=all").splitlines())
    if not count:
        return f"of commit {commit}"
    return (
        f"of commit {commit}; {count} changed file{'s are' if count > 1 else ' is'} not in it, "
        "commit first if they should be"
    )


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
        problem = done.stderr.decode(errors="replace").strip() if done.returncode else ""
    except FileNotFoundError:
        problem = "git is not installed"
    if problem:
        raise OSError(
            f"the folder must be a git repository with a commit, got {root} ({problem}); "
            "clone the course with git and run this there"
        )
    return done.stdout


def write_zip(files: dict[str, tuple[bytes, bool]], out: Path) -> None:
    """Write the files below `FOLDER`; equal files give equal bytes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            content, executable = files[name]
            entry = zipfile.ZipInfo(FOLDER + name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, on every system, so that modes are kept
            entry.external_attr = (0o100755 if executable else 0o100644) << 16
            archive.writestr(entry, content)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 and a sentence when there is nothing to pack."""
    parser = argparse.ArgumentParser(
        prog="python -m instructor.release", description="Pack the course for students."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "course-students.zip")
    options = parser.parse_args(arguments)
    try:
        files, packed = student_files(), state()
        write_zip(files, options.out)
    except OSError as error:
        print(f"Nothing packed: {error}", file=sys.stderr)
        return 2
    print(f"{len(files)} files in {options.out}, {packed}")
    return 0
