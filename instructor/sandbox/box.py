"""Students' code in children that can do nothing but answer; the grader's side of it.

A fork server (`child`), a small Python of its own, forks one limited child per job. What a child
may not do is in `cage`. This module starts the server, picks the strongest level that the machine
offers and holds it against real attempts to get out, then talks to several children at a time over
pipes, in one thread (`talk`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from fitcast.units import Said, refusal

from . import cage
from .child import CHANNEL
from .probe import ABOUT_GRADER, SEES, Probe
from .reading import Reading
from .talk import End, Job, Talk

YOUNG_SECONDS = 1.0  # older children are likely to wait, so others may run beside them
MOST_WAITING = 3  # times as many children as without any that wait
# Of this process, stopped or starved. A child's message waits for two passes of the loop at most,
# so no child is ended as idle (2.5 s, `forkserver`) while both are shorter.
STALL_SECONDS = 1.25
START = """import os, sys
os.dup2(int("{descriptor:05}"), {channel}, inheritable=False)
sys.path.insert(0, {root!r})
from instructor.sandbox.forkserver import main
sys.path.remove({root!r})
main()"""
READABLE = b'{"cells": [{"cell_type": "code", "source": "def f(): return 1"}]}'
MEMORY_SHARE, MOST_MEMORY = 0.5, 4 << 30  # of the machine's, for all children; bytes at most
CONTAINER = Path("/sys/fs/cgroup/memory.max")
SAYS = {
    "namespaces": "namespaces and seccomp: own root folder, no network, no other process",
    "landlock": "Landlock and seccomp: no other file, no network, no other process",
    "seccomp": "seccomp: no file, no network, no other process",
    "hook": "WEAK: Python's audit hook and limits only, which keep out accidents, not attackers",
}
# What a level lets through, as the probe calls it: it is said, where it is so.
KNOWN = {"landlock": {SEES}, "hook": {SEES, *ABOUT_GRADER}}


def memory_bytes() -> int:
    """How much all children together may take: half of what machine and container have."""
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if CONTAINER.is_file() and (text := CONTAINER.read_text().strip()).isdigit():
        have = min(have, int(text))
    return min(int(MEMORY_SHARE * have), MOST_MEMORY)


def about_python(python: str | None) -> tuple[str, str, dict[str, str]]:
    """Where a Python really is, its version such as "3.12", and where its modules are.

    Args:
        python: Its path or name; this one if None.

    Raises:
        ValueError: There is none, or it is too old.
    """
    if python is None:
        version = ".".join(map(str, sys.version_info[:2]))
        return sys.executable, version, sysconfig.get_paths()
    asks = (
        "import json, sys, sysconfig as s; print(json.dumps([sys.executable, "
        "'%d.%d' % sys.version_info[:2], s.get_paths(), sys.version_info >= (3, 11)]))"
    )
    try:
        done = subprocess.run([python, "-I", "-c", asks], capture_output=True, text=True)
        path, version, paths, recent = json.loads(done.stdout)
    except (OSError, ValueError):
        path, version, paths, recent = python, "none", {}, False
    if not recent:
        raise refusal(
            "--python",
            "be a Python of 3.11 or newer",
            Said(f"{python!r}, which is {version}"),
            "name one that starts, such as python3.13",
        )
    return path, version, paths


class Sandbox:
    """A fork server in its cage; a context manager.

    Args:
        level: One of `cage.LEVELS`; the strongest that works here if None.
        torch: Whether students' code may import torch and what else is installed.
        python: Another Python that runs it, from 3.11 on; the grader's own if None.

    Raises:
        ValueError: The level is unknown or does not work here.
    """

    def __init__(self, level: str | None = None, torch: bool = False, python: str | None = None):
        if level not in (None, *cage.LEVELS):
            raise refusal(
                "sandbox",
                f"be one of {', '.join(cage.LEVELS)}",
                level,
                "leave it out for the strongest",
            )
        self.torch, self.passed_over, self._server = torch, {}, None
        self.python, self.version, self._paths = about_python(python)
        self.memory_bytes = memory_bytes()
        for candidate in [level] if level else cage.LEVELS:
            problem = self._start(candidate) or self._problem(candidate)
            if problem is None:
                self.level = candidate
                return
            self.passed_over[candidate] = problem
            self._stop()
        raise refusal(
            "sandbox",
            "hold on this machine",
            self.passed_over,
            "grade on another one, e.g. a container of Linux 5.13 or newer",
        )

    @property
    def says(self) -> str:
        """What is in force, what was tried and what is not held, for people, in a line."""
        held = (
            f"{self.tried - len(self.known)} of {self.tried} ways out that were tried here are shut"
        )
        memory = f"{self.memory_bytes / 2**30:.1f} GiB for all children together"
        last = "whoever means it" if self.level == "hook" else "a bug in the kernel"
        user = ["the machine's root is theirs, without privileges"] if self.root else []
        open_ways = ", ".join([*(f"a child can {way}" for way in self.known), *user, last])
        return f"{SAYS[self.level]}; {held}; {memory}; not held: {open_ways}"

    def _start(self, level: str) -> str | None:
        """Start the server; what is wrong with the level here."""
        self._server = None
        if level == "landlock" and not cage.landlock_version():
            return "the kernel has no Landlock"
        if level != "hook" and not cage.syscalls.supported():
            return "seccomp is known here for Linux on x86-64 and arm64"
        paths = self._paths
        folders = [paths["stdlib"], paths["platstdlib"]]
        if self.torch:
            folders += [paths["purelib"], paths["platlib"]]
        readable = sorted({*folders, *map(os.path.realpath, folders)})
        ipython = importlib.util.find_spec("IPython")
        order = {
            "level": level,
            "readable": readable,
            "packages": sorted({paths["purelib"], paths["platlib"]}) if self.torch else [],
            "ipython": ipython.submodule_search_locations[0] if ipython else "",
            "grader": f"{os.getpid():08}",
        }
        self._orders, theirs = socket.socketpair()
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        start = START.format(
            descriptor=theirs.fileno(),
            channel=CHANNEL,
            root=str(Path(__file__).resolve().parent.parent.parent),
        )
        with theirs:
            self._server = subprocess.Popen(
                # Not -I: it would ignore the hash seed, and a set's order would change with it.
                [self.python, "-P", "-s", "-S", "-c", start, json.dumps(order)],
                env={"PYTHONHASHSEED": "0", **threads},
                cwd="/",
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=cage.same_addresses,
            )
        said = self._orders.recv(4096).decode().strip()
        return None if said == "ready" else said or "the fork server did not start"

    def _problem(self, level: str) -> str | None:
        """What a child can do that it should not, or cannot do that it should."""
        reading = Reading(READABLE, ["f"])
        with tempfile.TemporaryDirectory(prefix="grading-") as folder:
            # Open to all, so that only the sandbox can forbid it.
            os.chmod(folder, 0o777)
            path = Path(folder, "secret")
            path.write_text("of the grader")
            path.chmod(0o644)
            probe = Probe(str(path), folder)
            for _ in self.run([reading, probe]):
                pass
        if "functions" not in (reading.about or {}):
            return "a child could not read a notebook"
        if probe.found is None:
            return "its child failed"
        self.tried, self.root = probe.tried, probe.root
        self.known = [way for way in probe.found if way in KNOWN.get(level, ())]
        found = [way for way in probe.found if way not in self.known]
        return f"a child could: {', '.join(found)}" if found else None

    def run(self, jobs: Iterable[Job], at_once: int | None = None) -> Iterator[Job]:
        """Do jobs, several at a time; yields each when its child is gone.

        Jobs that follow from one come before the next of `jobs`.
        """
        at_once = at_once or 2 * (os.cpu_count() or 1) + 2
        source, waiting, talks = iter(jobs), [], set()
        seen, stalled = time.monotonic(), 0.0
        with selectors.DefaultSelector() as selector:
            while True:
                while self._room(talks, at_once, seen) and (
                    job := self._next(source, waiting, talks)
                ):
                    talks.add(self._begin(selector, job))
                if not talks:
                    return
                events = selector.select(YOUNG_SECONDS)
                before, seen = seen, time.monotonic()
                if seen - before > STALL_SECONDS:
                    stalled = seen
                for key, happened in events:
                    talk = key.data
                    if key.fileobj.fileno() < 0:  # closed by an event of the same batch
                        continue
                    if key.fileobj is talk.channel:
                        self._move(selector, talk, happened)
                        continue
                    talks.remove(talk)
                    end = self._close(selector, talk)
                    if end.by_clock and talk.started < stalled and talk.in_vain:
                        talk.job.stalls += 1  # it may have waited for this process
                        waiting.append(talk.job)
                        continue
                    waiting += talk.job.ended(end)
                    yield talk.job

    @staticmethod
    def _room(talks: Collection[Talk], at_once: int, now: float) -> bool:
        """Whether one child more may run beside these."""
        young = sum(now - talk.started < YOUNG_SECONDS for talk in talks)
        return young < at_once and len(talks) < MOST_WAITING * at_once

    def _next(
        self, source: Iterator[Job], waiting: list[Job], talks: Collection[Talk]
    ) -> Job | None:
        """The next job, if there is one and all children together have the memory for it."""
        job = waiting.pop(0) if waiting else next(source, None)
        taken = sum(talk.job.memory_bytes for talk in talks)
        if job is None or not talks or taken + job.memory_bytes <= self.memory_bytes:
            return job
        waiting.insert(0, job)
        return None

    def _begin(self, selector: selectors.BaseSelector, job: Job) -> Talk:
        talk = Talk(job, self._orders)
        selector.register(talk.channel, selectors.EVENT_READ | selectors.EVENT_WRITE, talk)
        selector.register(talk.status, selectors.EVENT_READ, talk)
        return talk

    @staticmethod
    def _close(selector: selectors.BaseSelector, talk: Talk) -> End:
        """Take in the last words of a child that is gone."""
        data = talk.status.recv(64)
        if talk.channel.fileno() in selector.get_map():
            while talk.read():
                pass
            selector.unregister(talk.channel)
        selector.unregister(talk.status)
        talk.channel.close()
        talk.status.close()
        return talk.how(data)

    @staticmethod
    def _move(selector: selectors.BaseSelector, talk: Talk, events: int) -> None:
        ended = events & selectors.EVENT_READ and talk.read() is False
        if talk.out:
            talk.write()
        if ended:
            selector.unregister(talk.channel)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if talk.out else 0)
        selector.modify(talk.channel, wanted, talk)

    def _stop(self) -> None:
        if self._server is not None:
            self._orders.close()
            try:
                self._server.wait(5)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()
