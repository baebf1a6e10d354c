"""Students' code in children that can do nothing but answer; the grader's side of it.

A fork server (`child`), a small Python of its own, forks one limited child per job. What a child
may not do is in `cage`. This module starts the server, picks the strongest level that the machine
offers and holds it against real attempts to get out, then talks to several children at a time over
pipes, in one thread.

Why forging gains nothing: the child is asked for one case's answer at a time and sends back a value
with that case's nonce. The grader, in another process, compares it with what is expected. Code that
takes over the child, patches its functions or writes to its pipe can thus send only a value, as any
answer is; there is no "passed" to send. The nonce makes a value sent ahead of its question useless.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cage
from .child import CHANNEL, ENDED, ORDER

LONGEST_MESSAGE = 1 << 16  # bytes that a child may send at once
LONGEST_READING = 1 << 22  # of the child that reads a notebook
START = """import os, sys
os.dup2({descriptor}, {channel}, inheritable=False)
sys.path.insert(0, {root!r})
from instructor.child import main
sys.path.remove({root!r})
main()"""
SAYS = {
    "namespaces": "namespaces and seccomp: own root folder, no network, no other process",
    "landlock": "Landlock and seccomp: no other file, no network, no other process",
    "seccomp": "seccomp: no file, no network, no other process",
    "hook": "WEAK: Python's audit hook and limits only, which keep out accidents, not attackers",
}
PROBE = '''
def escapes(path, folder, process):
    """What this child can do and should not: names of attempts that succeed."""
    import ctypes, os, socket
    def read(name):
        with open(name, "rb") as file:
            return bool(file.read(1))
    def write():
        with open(folder + "/escaped", "w") as file:
            return bool(file.write("x"))
    def fork():
        if os.fork() == 0:
            os._exit(0)
        return True
    def connect():
        socket.socket().connect((b"127.0.0.1", 9))
        return True
    def refused():
        try:
            return connect()
        except ConnectionRefusedError:
            return True
    def hoard():
        return bool(bytearray(8 << 30))
    found = []
    for name, attempt in {
        "read a file of the grader": lambda: read(path), "write outside the temp folder": write,
        "read the grader's memory": lambda: read(f"/proc/{process}/environ"), "fork": fork,
        "signal the grader": lambda: os.kill(process, 0) is None, "network": refused,
        "take 8 GiB": hoard,
    }.items():
        try:
            if attempt():
                found.append(name)
        except (OSError, MemoryError, ImportError):
            continue
    return found
'''


@dataclass(frozen=True)
class End:
    """How a child ended.

    Args:
        how: `finished`, `time`, `memory`, `left` (it ended itself), `crash`, `flood` (it sent too
            much) or `garbage` (it sent what no answer is).
        detail: A few words more, e.g. the signal.
    """

    how: str
    detail: str = ""


class Job:
    """What one child is to do; a conversation. Subclasses fill it in."""

    cpu_seconds = 2.0
    memory_bytes = 512 * 1024 * 1024
    longest = LONGEST_MESSAGE

    @property
    def wall_seconds(self) -> float:
        """Long enough that a busy machine never turns an answer into a late one."""
        return 4 * self.cpu_seconds + 2

    def begin(self) -> bytes:
        """What the child is told first."""
        raise NotImplementedError

    def receive(self, message: dict) -> bytes | None:
        """What to say to a message; None when nothing is left to ask.

        Raises:
            ValueError: It is no message that the child may send; the child is then ended.
        """
        raise NotImplementedError

    def ended(self, end: End) -> Iterable[Job]:
        """The child is gone; returns jobs that follow from it."""
        raise NotImplementedError


class _Talk:
    """One child's channel and its warden's."""

    def __init__(self, job: Job, orders: socket.socket):
        self.job, self.end = job, None
        self.channel, child = socket.socketpair()
        self.status, warden = socket.socketpair()
        with child, warden:
            order = ORDER.pack(job.cpu_seconds, job.wall_seconds, job.memory_bytes)
            socket.send_fds(orders, [order], [child.fileno(), warden.fileno()])
        self.channel.setblocking(False)
        self.out, self.into = memoryview(job.begin()), bytearray()

    def stop(self, end: End | None) -> None:
        """Say no more; with an end, have the child killed."""
        if end is not None and self.end is None:
            self.end = end
            with contextlib.suppress(OSError):  # its warden may be done already
                self.status.send(b"x")
        self.out = memoryview(b"")
        with contextlib.suppress(OSError):  # the child may be gone already
            self.channel.shutdown(socket.SHUT_WR)

    def write(self) -> None:
        try:
            self.out = self.out[self.channel.send(self.out):]
        except BlockingIOError:
            return
        except OSError:  # the child is gone; its warden says how
            self.out = memoryview(b"")

    def read(self) -> bool:
        """Take in what the child sent; False when it will send no more."""
        try:
            part = self.channel.recv(1 << 16)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        self.into += part
        while self.end is None and (end := self.into.find(b"\n")) >= 0:
            line = bytes(self.into[:end])
            del self.into[:end + 1]
            self._message(line)
        if self.end is None and len(self.into) > self.job.longest:
            self.stop(End("flood"))
        if self.end is not None:
            self.into.clear()
        return bool(part)

    def _message(self, line: bytes) -> None:
        if len(line) > self.job.longest:
            return self.stop(End("flood"))
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            return self.stop(End("garbage"))
        try:
            reply = self.job.receive(message)
        except ValueError:
            return self.stop(End("garbage"))
        if reply is None:
            return self.stop(None)
        self.out = memoryview(bytes(self.out) + reply)

    def how(self, data: bytes) -> End:
        """From what the warden said."""
        if self.end is not None:
            return self.end
        status, told, cpu_seconds = ENDED.unpack(data) if len(data) == ENDED.size else (9, 0, 0.0)
        code = os.waitstatus_to_exitcode(status)
        if told == 2 or code in (-signal.SIGKILL, -signal.SIGXCPU) \
                and cpu_seconds > self.job.cpu_seconds - 0.2:
            return End("time")
        if code == -signal.SIGKILL:
            return End("memory")
        if code < 0:
            return End("crash", signal.Signals(-code).name)
        return End("left", str(code)) if code else End("finished")


class Sandbox:
    """A fork server in its cage; a context manager.

    Args:
        level: One of `cage.LEVELS`; the strongest that works here if None.
        torch: Whether students' code may import torch and what else is installed.

    Raises:
        ValueError: The level is unknown or does not work here.
    """

    def __init__(self, level: str | None = None, torch: bool = False):
        if sys.platform == "win32":
            raise ValueError("grading must run on Linux or macOS, got Windows; use WSL")
        if level not in (None, *cage.LEVELS):
            raise ValueError(f"sandbox must be one of {', '.join(cage.LEVELS)}, got {level!r}; "
                             "leave it out for the strongest")
        self.torch, self.passed_over = torch, {}
        self._folder = tempfile.TemporaryDirectory(prefix="grading-")
        os.chmod(self._folder.name, 0o711)
        for candidate in [level] if level else cage.LEVELS:
            problem = self._start(candidate) or self._problem()
            if problem is None:
                self.level = candidate
                return
            self.passed_over[candidate] = problem
            self._stop()
        self._folder.cleanup()
        raise ValueError(f"sandbox must hold on this machine, got {self.passed_over}; "
                         "grade on another one, e.g. a container of Linux 5.13 or newer")

    @property
    def says(self) -> str:
        """What is in force, for people."""
        return SAYS[self.level]

    def _start(self, level: str) -> str | None:
        """Start the server; what is wrong with the level here."""
        self._server = None
        if level == "landlock" and not cage.landlock_version():
            return "the kernel has no Landlock"
        if level != "hook" and not cage.syscalls.supported():
            return "seccomp is known here for Linux on x86-64 and arm64"
        paths = sysconfig.get_paths()
        folders = [paths["stdlib"], paths["platstdlib"]]
        if self.torch:
            folders += [paths["purelib"], paths["platlib"]]
        readable = sorted({os.path.realpath(folder) for folder in folders})
        order = {"level": level, "readable": readable, "folder": self._folder.name,
                 "packages": sorted({paths["purelib"], paths["platlib"]}) if self.torch else []}
        self._orders, theirs = socket.socketpair()
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        start = START.format(descriptor=theirs.fileno(), channel=CHANNEL,
                             root=str(Path(__file__).resolve().parent.parent))
        with theirs:
            self._server = subprocess.Popen(
                # Not -I: it would ignore the hash seed, and a set's order would change with it.
                [sys.executable, "-P", "-s", "-S", "-c", start, json.dumps(order)],
                env={"PYTHONHASHSEED": "0", **threads}, cwd="/", stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()], start_new_session=True)
        said = self._orders.recv(4096).decode().strip()
        return None if said == "ready" else said or "the fork server did not start"

    def _problem(self) -> str | None:
        """What a child can do that it should not."""
        path = Path(self._folder.name, "secret")
        path.write_text("of the grader")
        path.chmod(0o644)
        probe = _Probe(str(path), self._folder.name)
        for _ in self.run([probe]):
            pass
        if probe.found == []:
            return None
        return f"a child could: {', '.join(probe.found)}" if probe.found else "its child failed"

    def run(self, jobs: Iterable[Job], at_once: int | None = None) -> Iterator[Job]:
        """Do jobs, several at a time; yields each when its child is gone.

        Jobs that follow from one come before the next of `jobs`.
        """
        at_once = at_once or 2 * (os.cpu_count() or 1) + 2
        source, waiting, running = iter(jobs), [], 0
        with selectors.DefaultSelector() as selector:
            while True:
                while running < at_once:
                    job = waiting.pop(0) if waiting else next(source, None)
                    if job is None:
                        break
                    talk = _Talk(job, self._orders)
                    selector.register(talk.channel, selectors.EVENT_READ | selectors.EVENT_WRITE,
                                      talk)
                    selector.register(talk.status, selectors.EVENT_READ, talk)
                    running += 1
                if not running:
                    return
                for key, events in selector.select():
                    talk = key.data
                    if key.fileobj is talk.channel:
                        self._move(selector, talk, events)
                        continue
                    data = talk.status.recv(64)
                    if talk.channel.fileno() in selector.get_map():
                        while talk.read():  # what it sent before it ended
                            pass
                        selector.unregister(talk.channel)
                    selector.unregister(talk.status)
                    talk.channel.close()
                    talk.status.close()
                    running -= 1
                    waiting += talk.job.ended(talk.how(data))
                    yield talk.job

    @staticmethod
    def _move(selector: selectors.BaseSelector, talk: _Talk, events: int) -> None:
        open_ = talk.read() if events & selectors.EVENT_READ else True
        if talk.out:
            talk.write()
        if not open_:
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
        self._folder.cleanup()


class Questions(Job):
    """Call one function with one list of arguments after the other.

    Args:
        source: `[cell, text]` of each statement that has to run before.
        function: Its name.
    """

    def __init__(self, source: Sequence[Sequence], function: str):
        self._source, self._function = source, function
        self._nonce = ""

    def begin(self) -> bytes:
        return self._line({"source": self._source, "function": self._function}) + self.put()

    def put(self) -> bytes:
        """The next question."""
        arguments, asks = self.next()
        self._nonce = secrets.token_hex(16)
        return self._line({"nonce": self._nonce, "arguments": arguments, "asks": asks})

    def next(self) -> tuple[Sequence, bool]:
        """Arguments of the next call, and whether it gets an oracle to ask."""
        raise NotImplementedError

    def asked_now(self, message: dict) -> bool:
        """Whether the message answers the question that was put last."""
        return message.get("nonce") == self._nonce

    @staticmethod
    def _line(message: dict) -> bytes:
        return json.dumps(message).encode() + b"\n"


class _Probe(Questions):
    """Tries to get out."""

    def __init__(self, path: str, folder: str):
        super().__init__([[1, textwrap.dedent(PROBE)]], "escapes")
        self._arguments = [path, folder, os.getpid()]
        self.found: list[str] | None = None

    def next(self) -> tuple[Sequence, bool]:
        return self._arguments, False

    def receive(self, message: dict) -> bytes | None:
        self.found = message.get("value")
        return None

    def ended(self, end: End) -> Iterable[Job]:
        return ()
