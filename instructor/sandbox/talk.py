"""Talking to one child: what it is told, what is taken from it, how it ended.

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
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .forkserver import ENDED, HUNG_UP, IDLE, ORDER, TIME

LONGEST_MESSAGE = 1 << 16  # bytes that a child may send at once
MOST_STALLS = 5  # more of them, and who sleeps would hold up a starved class for ever
DEEPEST = 50  # lists in lists, or dictionaries; what is deeper crashes what writes it down


@dataclass(frozen=True)
class End:
    """How a child ended.

    Args:
        how: `finished`, `time`, `idle` (it waited), `memory`, `left` (it ended itself), `crash`,
            `flood` (it sent too much), `deep` (it sent lists in lists in lists ...) or `garbage`
            (it sent what no answer is).
        detail: A few words more, e.g. the signal.
        by_clock: Whether a clock on the wall decided.
        cpu_seconds: CPU time that the child took, if its warden could say.
    """

    how: str
    detail: str = ""
    by_clock: bool = False
    cpu_seconds: float = field(default=0.0, compare=False)


class Job:
    """What one child is to do; a conversation. Subclasses fill it in.

    It may be begun anew, in another child, as long as something is left to ask.
    """

    cpu_seconds = 2.0
    memory_bytes = 512 * 1024 * 1024
    longest = LONGEST_MESSAGE
    stalls = 0  # of the grader, after which it was begun anew

    @property
    def wall_seconds(self) -> float:
        """Long enough that a busy machine never turns an answer into a late one.

        One that only waits is ended much sooner, by its warden.
        """
        return 6 * self.cpu_seconds + 10

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


class Talk:
    """One child's channel and its warden's."""

    def __init__(self, job: Job, orders: socket.socket):
        self.job, self.end, self.started = job, None, time.monotonic()
        self.channel, child = socket.socketpair()
        self.status, warden = socket.socketpair()
        with child, warden:
            order = ORDER.pack(job.cpu_seconds, job.wall_seconds, job.memory_bytes)
            socket.send_fds(orders, [order], [child.fileno(), warden.fileno()])
        self.channel.setblocking(False)
        self.out, self.into = memoryview(job.begin()), bytearray()
        self.said_all = False  # nothing is left to ask

    @property
    def in_vain(self) -> bool:
        """Whether the job may be begun anew after a stall: something is left to ask."""
        return not self.said_all and self.job.stalls < MOST_STALLS

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
            self.out = self.out[self.channel.send(self.out) :]
        except BlockingIOError:
            return
        except OSError:  # the child is gone; its warden says how
            self.out = memoryview(b"")

    def read(self) -> bool | None:
        """Take in what the child sent; False when it will send no more, None for nothing yet."""
        try:
            part = self.channel.recv(1 << 16)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return False
        self.into += part
        while self.end is None and (end := self.into.find(b"\n")) >= 0:
            line = bytes(self.into[:end])
            del self.into[: end + 1]
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
        except RecursionError:
            return self.stop(End("deep"))
        except (ValueError, MemoryError):
            message = None
        if not isinstance(message, dict):
            return self.stop(End("garbage"))
        if not shallow(message):
            return self.stop(End("deep"))
        try:
            reply = self.job.receive(message)
        except ValueError:
            return self.stop(End("garbage"))
        if reply is None:
            self.said_all = True
            return self.stop(None)
        self.out = memoryview(bytes(self.out) + reply)

    def how(self, data: bytes) -> End:
        """From what the warden said."""
        if len(data) < ENDED.size:
            return self.end or End("crash", "its warden ended")
        status, who, cpu_seconds = ENDED.unpack(data)
        return replace(self.end or self._verdict(status, who, cpu_seconds), cpu_seconds=cpu_seconds)

    def _verdict(self, status: int, who: int, cpu_seconds: float) -> End:
        if who in (TIME, IDLE):
            return End("time" if who == TIME else "idle", by_clock=True)
        if who == HUNG_UP:
            return End("garbage")
        code = os.waitstatus_to_exitcode(status)
        # The kernel's limit counts in ticks, which run ahead of the time used on a busy machine.
        if code in (-signal.SIGKILL, -signal.SIGXCPU) and cpu_seconds > self.job.cpu_seconds / 2:
            return End("time")
        if code == -signal.SIGKILL:
            return End("memory")
        if code < 0:
            return End("crash", signal.Signals(-code).name)
        return End("left", str(code)) if code else End("finished")


def shallow(value: Any) -> bool:
    """Whether nothing in a JSON value is nested deeper than `DEEPEST`.

    Every value of a child passes here: parsers differ in how deep they follow (Python 3.13.0's to
    about 10 000), and what one has read another may not be able to write.
    """
    level = [value]
    for _ in range(DEEPEST):
        level = [
            part
            for one in level
            if isinstance(one, list | dict)
            for part in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return True
    return False


def line(message: dict) -> bytes:
    """A message as the child reads it."""
    return json.dumps(message).encode() + b"\n"


class Questions(Job):
    """Call a function with one list of arguments after the other.

    Args:
        source: `[cell, text]` of each statement that has to run before.
        function: Its name.
    """

    def __init__(self, source: Sequence[Sequence], function: str):
        self._source, self._function = source, function
        self._nonce = ""

    def begin(self) -> bytes:
        return self.turn_to(self._source, self._function)

    def turn_to(self, source: Sequence[Sequence], function: str) -> bytes:
        """Run these statements, then ask this function for its first case."""
        return line({"source": source, "function": function}) + self.put()

    def put(self) -> bytes:
        """The next question."""
        arguments, asks = self.next()
        self._nonce = secrets.token_hex(16)
        return line({"nonce": self._nonce, "arguments": arguments, "asks": asks})

    def next(self) -> tuple[Sequence, bool]:
        """Arguments of the next call, and whether it gets an oracle to ask."""
        raise NotImplementedError

    def asked_now(self, message: dict) -> bool:
        """Whether the message answers the question that was put last."""
        return message.get("nonce") == self._nonce
