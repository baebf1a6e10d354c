"""What came back: a folder or a zip of an LMS, read without unpacking, each file on its own.

A file that cannot be graded is refused with a sentence and costs only itself. Nothing is ever
written to disk, so a path in a zip leads nowhere; names that try are refused all the same.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath

from fitcast.units import Said, refusal

from ..lms.base import PLAIN, Platform
from .roster import file_name, fold

MOST_BYTES = 10 * 1024 * 1024  # of a notebook
MOST_FILES = 20_000
# Of a student's folder, two below the class's at most, so that it never costs the class.
MOST_NOTEBOOKS, MOST_OTHERS = 1_000, 100
MOST_RATIO = 200  # of a larger zip entry's size to what it takes in the zip
ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz")
SYSTEM = re.compile(
    r"(^|/)(__MACOSX|\.ipynb_checkpoints|\.git(hub)?|\.DS_Store|Thumbs\.db|desktop\.ini"
    r"|\._[^/]*)(/|$)"
)
SHORTEST_TOKEN = 3  # characters of an id that may be part of a file's name


class Refused(ValueError):
    """A file that is not read, and the sentence that says why."""


@dataclass(frozen=True)
class Submission:
    """A file that came back.

    Args:
        name: Its path in the folder or zip, with `/`; safe to show.
        modified: When it was changed last, as the folder or zip has it; None if unknown.
        read: Returns its bytes; raises `Refused`.
        problem: Why it is refused before it is read; empty if it is not.
    """

    name: str
    modified: datetime | None
    read: Callable[[], bytes]
    problem: str = ""


def collect(path: Path) -> list[Submission]:
    """All files of a folder or zip, or the one notebook that the path names, by name.

    Raises:
        ValueError: There is nothing of the kind.
    """
    if path.is_dir():
        found = _of_folder(path)
    elif path.suffix.lower() == ".ipynb" and path.is_file():
        found = [_file(path, path.name)]
    elif path.is_file():
        found = _of_zip(path)
    else:
        got = Said(f"{str(path)!r}, which is not there")
        raise refusal("submissions", "be a folder or a zip", got, "check the path")
    return sorted((s for s in found if not SYSTEM.search(s.name)), key=lambda s: s.name)


def _of_folder(folder: Path) -> list[Submission]:
    found, left = [], Counter()
    for place, folders, files in os.walk(folder):
        here = Path(place)
        student = here.relative_to(folder).parts[:2]
        folders[:] = sorted(name for name in folders if not SYSTEM.search(name))
        # os.walk does not enter a link to a folder; it has to be told of as well.
        links = [name for name in folders if (here / name).is_symlink()]
        for name in sorted([*files, *links]):
            kind = student, Path(name).suffix == ".ipynb"
            left[kind] += 1
            if not student or left[kind] <= (MOST_NOTEBOOKS if kind[1] else MOST_OTHERS):
                found.append(_file(here / name, (here / name).relative_to(folder).as_posix()))
        _count(found)
    for (student, notebooks), count in sorted(left.items()):
        if student and (rest := count - (MOST_NOTEBOOKS if notebooks else MOST_OTHERS)) > 0:
            name = _shown("/".join([*student, "..."]))
            problem = f"{rest} more files of this folder, which are not looked at"
            found.append(Submission(name, None, bytes, problem))
    return found


def _file(path: Path, name: str) -> Submission:
    state = path.lstat()
    kind = stat.S_IFMT(state.st_mode)
    problem = _name_problem(name)
    if kind == stat.S_IFLNK:
        problem = "it is a link to another file, which is not followed"
    elif kind != stat.S_IFREG:
        problem = "it is no ordinary file"
    elif state.st_size > MOST_BYTES:
        problem = _too_large(state.st_size)
    modified = datetime.fromtimestamp(int(state.st_mtime))
    return Submission(_shown(name), modified, partial(_read_file, path), problem)


def _read_file(path: Path) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            return _bounded(file.read(MOST_BYTES + 1))
    except OSError as error:
        raise Refused(f"it cannot be read: {error.strerror}") from None


def _of_zip(path: Path) -> list[Submission]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        got = Said(f"{str(path)!r} ({error})")
        raise refusal("submissions", "be a folder or a zip", got, "download it again") from None
    found, seen = [], set()
    for entry in archive.infolist():
        if entry.is_dir():
            continue
        problem = _entry_problem(entry)
        if not problem and entry.filename in seen:
            problem = "the zip has two files of this name, the first one counts"
        seen.add(entry.filename)
        try:
            modified = datetime(*entry.date_time) if entry.date_time[0] > 1980 else None
        except ValueError:
            modified = None
        found.append(
            Submission(
                _shown(entry.filename), modified, partial(_read_entry, archive, entry), problem
            )
        )
        _count(found)
    return found


def _entry_problem(entry: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "it is a link to another file, which is not followed"
    if kind not in (0, stat.S_IFREG):
        return "it is no ordinary file"
    if entry.flag_bits & 1:
        return "it is encrypted; ask for it without a password"
    if entry.file_size > MOST_BYTES:
        if entry.file_size > MOST_RATIO * max(1, entry.compress_size):
            return "it would unpack to far more than its size, as a zip bomb does"
        return _too_large(entry.file_size)
    return _name_problem(entry.filename)


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(entry) as file:
            return _bounded(file.read(MOST_BYTES + 1))
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        OSError,
        EOFError,
    ) as error:
        raise Refused(f"it is damaged ({type(error).__name__}); ask for it again") from None


def _bounded(data: bytes) -> bytes:
    if len(data) > MOST_BYTES:
        raise Refused(_too_large(len(data)))
    return data


def _too_large(count: int) -> str:
    return (
        f"it is larger than {MOST_BYTES >> 20} MiB ({count >> 20} MiB); clear its outputs "
        "and hand it in again"
    )


def _name_problem(name: str) -> str:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or name[:1] in "/\\" or re.match(r"[A-Za-z]:", name):
        return "its name leads out of the archive"
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in ARCHIVES:
        return "it is an archive inside the archive; ask for the .ipynb itself"
    return "" if suffix == ".ipynb" else "it is no notebook (.ipynb)"


def _count(found: Sequence[Submission]) -> None:
    if len(found) > MOST_FILES:
        raise refusal(
            "submissions",
            f"be at most {MOST_FILES} files",
            Said("more"),
            "is this the right folder?",
        )


def _shown(name: str) -> str:
    """Without control characters and lone surrogates, and not endless."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return clean if len(clean) <= 200 else clean[:100] + "…" + clean[-99:]


class Names:
    """Whom a file's path names: what the platform calls a student, ids, and names in either order.

    Args:
        rows: The roster.
        assignment: Whose built notebooks' names are known.
        platform: Whose export the roster is.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, str]], assignment: str, platform: Platform = PLAIN
    ):
        self.platform = platform
        self._keys = {platform.key(row): row["student_id"] for row in rows if platform.key(row)}
        self._exact = {row["student_id"] for row in rows}
        self._ids: dict[str, set[str]] = {}
        self._people: dict[str, set[str]] = {}
        self._cells: dict[str, set[str]] = {}
        for row in rows:
            own = row["student_id"]
            built = PurePosixPath(file_name(assignment, own)).stem
            for name in (own, built):
                self._ids.setdefault(fold(name), set()).add(own)
            for cell in filter(None, row.values()):
                self._cells.setdefault(fold(cell), set()).add(own)
            words = _words(row["name"])
            for order in {tuple(words), tuple(words[-1:] + words[:-1])}:
                if len(words) > 1:
                    self._people.setdefault("".join(order), set()).add(own)

    @property
    def alike(self) -> list[tuple[str, ...]]:
        """Ids that differ in nothing but case, Unicode form or white space around."""
        return sorted(tuple(sorted(ids)) for ids in self._ids.values() if len(ids) > 1)

    def by_id(self, student_id: str | None) -> str | None:
        """The roster's spelling of an id; None if it has none such.

        A platform's number is not what students know of themselves, so whatever else in the roster
        is one student's alone will do: a login, an address, a name.
        """
        if (own := (student_id or "").strip()) in self._exact:
            return own
        found = self._ids.get(fold(own)) or self._cells.get(fold(own), set())
        return next(iter(found)) if len(found) == 1 else None

    def stranger(self, path: str) -> str:
        """What the platform calls somebody who is not in the roster; empty if nobody is."""
        key = self.platform.owner(path, self._keys)
        return key if key is not None and key not in self._keys else ""

    def of(self, path: str) -> list[str]:
        """The students whom a path names, the first one first.

        An LMS puts its own words in front, a folder or the start of the name, and the student's
        choice of a name after it: so the first is the one to believe.
        """
        found: list[str] = []
        if (key := self.platform.owner(path, self._keys)) in self._keys:
            found, path = [self._keys[key]], self.platform.own_part(path)
        for part in PurePosixPath(path).parts:
            stem = part.removesuffix(".ipynb")
            stem = fold(re.sub(r"[ _-]*\(\d+\)$", "", stem))  # a browser's second copy
            for named in [self._ids.get(stem, set()), *self._runs(stem)]:
                if len(named) == 1:
                    found += named - set(found)
        return found

    def _runs(self, stem: str) -> Iterator[set[str]]:
        """Who is named by what starts at each piece of a name, the longest first."""
        pieces = re.findall(r"[^\W_]+|[\W_]", stem)
        for start in (index for index, piece in enumerate(pieces) if piece.isalnum()):
            for end in range(min(start + 12, len(pieces)), start, -1):
                run = "".join(pieces[start:end])
                known = self._ids.get(run) if len(run) >= SHORTEST_TOKEN else None
                yield known or self._people.get("".join(_words(run)), set())


def _words(text: str) -> list[str]:
    """Lower case, without accents, letters and digits only."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"[^\W_]+", "".join(c for c in plain if not unicodedata.combining(c)))
