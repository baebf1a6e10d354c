"""The cage around a student's code: what the machine offers, strongest first.

- `namespaces`: a root folder of its own with Python's standard library, read-only, and an empty
  temp folder in memory; no network, no other process, no /proc; and seccomp. Linux, where users
  may.
- `landlock`: the kernel refuses every other file and TCP; and seccomp, which refuses sockets,
  processes, signals and new files. Linux 5.13, containers included.
- `seccomp`: no file can be opened at all, so modules not yet loaded are missing.
- `hook`: Python's audit hook. It keeps out accidents, not attackers.

Limits on CPU time, memory, file size, processes and core dumps are in force at every level. Nothing
is ever left on disk: outside of `namespaces` a child can make no file. The functions here run in
the fork server and its children, never in the grader's own process.

Why not bubblewrap (nsjail is no package of Debian 12): it starts one program in a cage like
`namespaces`. A Python that is started for each child, with what children need loaded, costs 46 ms
of CPU, where a fork costs 7: for the 3 100 children of 500 notebooks 143 s instead of 22. Around
the fork server alone it replaces `enter_namespaces`, 44 lines, and then children share a temp
folder and see each other. `landlock` and `seccomp`, which work in containers, would have to stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys
import time
from collections.abc import Sequence

from . import syscalls

LEVELS = ("namespaces", "landlock", "seccomp", "hook")
NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
TEMP_OPTIONS = b"size=4m,nr_inodes=512,mode=1777"
FILE_BYTES = 1024 * 1024  # of one file, what a function prints among them
# linux/sched.h, sys/mount.h
NEW_MOUNTS, NEW_IPC, NEW_USER = 0x20000, 0x08000000, 0x10000000
NEW_UTS, NEW_PIDS, NEW_NETWORK = 0x04000000, 0x20000000, 0x40000000
READ_ONLY, NO_SETUID, NO_DEVICES, REMOUNT = 1, 2, 4, 32
BIND, RECURSIVE, PRIVATE, DETACH = 1 << 12, 1 << 14, 1 << 18, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# linux/landlock.h; its calls have one number on all machines
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_RIGHTS, FILE_RIGHTS = 0b1100, 0b110  # read file and folder; write and read file
RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many bits
DIE_WITH_PARENT, DROP_BOUND = 1, 24  # prctl
NO_RANDOM_ADDRESSES = 0x0040000  # linux/personality.h
NO_CAPABILITIES = bytes(24)  # effective, permitted, inheritable, twice
LIMITS = [
    (getattr(resource, name), amount)
    for name, amount in {
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_FSIZE": FILE_BYTES,
    }.items()
    if hasattr(resource, name)
]
# What harmless Python does; everything else that Python reports raises.
HARMLESS = {
    "import",
    "compile",
    "exec",
    "marshal.loads",
    "marshal.load",
    "code.__new__",
    "object.__getattr__",
    "object.__setattr__",
    "object.__delattr__",
    "function.__new__",
    "builtins.id",
    "builtins.input",
    "builtins.input/result",
    "array.__new__",
    "sys._getframe",
    "sys.excepthook",
    "sys.unraisablehook",
    "time.sleep",
}
READS = {"open", "os.listdir", "os.scandir"}

libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    result = getattr(libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _mount(source: str, target: str, kind: str, flags: int, options: bytes | None = None) -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options)


def same_addresses() -> None:
    """Have the program that is started next find its memory at the same addresses in every run.

    So code that exhausts its memory ends in the same way in every run. Nothing is lost: a child can
    read its own addresses anyway. Some containers refuse; then runs may differ.
    """
    if sys.platform == "linux":
        libc.personality(NO_RANDOM_ADDRESSES)


def die_with_parent() -> None:
    """Be killed as soon as the process that forked this one ends (Linux)."""
    if sys.platform == "linux":
        libc.prctl(DIE_WITH_PARENT, 9, 0, 0, 0)


def enter_namespaces(readable: Sequence[str]) -> None:
    """Leave the machine's files, network and shared memory behind: the fork server does, once.

    Args:
        readable: Folders that stay, read-only, under the names they have.

    Raises:
        OSError: The kernel or the container does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    _call("unshare", NEW_MOUNTS | NEW_NETWORK | NEW_IPC | NEW_UTS | (NEW_USER if user else 0))
    if user:
        for name, text in {
            "setgroups": "deny",
            "uid_map": f"{NOBODY} {user} 1",
            "gid_map": f"{NOBODY} {group} 1",
        }.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount("none", "/", "none", RECURSIVE | PRIVATE)
    # The new root covers /tmp for a moment, and a folder to keep may lie below it: open them first.
    opened = {path: os.open(path, os.O_PATH) for path in (*readable, *DEVICES)}
    root = "/tmp"
    _mount("tmpfs", root, "tmpfs", NO_SETUID | NO_DEVICES, b"size=1m,mode=755")
    for path, descriptor in opened.items():
        target = root + path
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        if path in DEVICES:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        else:
            os.makedirs(target, mode=0o755, exist_ok=True)
        # What the mount already forbids is locked and has to be said again.
        kept = os.fstatvfs(descriptor).f_flag & ~READ_ONLY & 0xF | NO_SETUID
        kept |= 0 if path in DEVICES else NO_DEVICES | READ_ONLY
        _mount(f"/proc/self/fd/{descriptor}", target, "none", BIND)
        _mount("none", target, "none", REMOUNT | BIND | kept)
        os.close(descriptor)
    os.makedirs(root + "/tmp", exist_ok=True)
    os.chdir(root)
    machine = os.uname().machine
    _call("syscall", PIVOT_ROOT[machine], b".", b".")
    _call("umount2", b".", DETACH)
    os.chdir("/")
    _mount("none", "/", "none", REMOUNT | READ_ONLY | NO_SETUID | NO_DEVICES)


def new_process_tree() -> None:
    """The next fork is the first process of a tree that ends with it; with mounts of its own."""
    _call("unshare", NEW_PIDS | NEW_MOUNTS | NEW_IPC)


def private_temp() -> str:
    """An empty temp folder in memory that no other child sees."""
    _mount("tmpfs", "/tmp", "tmpfs", NO_SETUID | NO_DEVICES, TEMP_OPTIONS)
    return "/tmp"


def landlock_version() -> int:
    """The kernel's Landlock version; 0 if it has none."""
    return max(0, libc.syscall(CREATE_RULESET, None, 0, 1)) if sys.platform == "linux" else 0


def landlock(readable: Sequence[str]) -> None:
    """Refuse every file but those below these folders, to be read, and every TCP connection.

    Raises:
        OSError: The kernel has no Landlock.
    """
    version = landlock_version()
    files = (1 << RIGHTS_OF_VERSION.get(min(version, 5), 0)) - 1
    size = 8 if version < 4 else 16 if version < 6 else 24
    rights = struct.pack("=QQQ", files, 0b11, 0b11)[:size]  # files; bind, connect; sockets, signals
    ruleset = _call("syscall", CREATE_RULESET, rights, size, 0)
    for path, allowed in [
        *((path, READ_RIGHTS) for path in readable),
        *((path, FILE_RIGHTS) for path in DEVICES),
    ]:
        descriptor = os.open(path, os.O_PATH)
        _call("syscall", ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, descriptor), 0)
        os.close(descriptor)
    _call("prctl", syscalls.NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call("syscall", RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def become_nobody() -> None:
    """Give up every privilege: root turns into nobody, capabilities go."""
    if sys.platform == "linux":
        number = 0
        while libc.prctl(DROP_BOUND, number, 0, 0, 0) == 0:  # until the kernel knows no more
            number += 1
    if os.getuid() == 0:
        # A container's root may be forbidden to become another user; without capabilities, and
        # behind Landlock or seccomp, it reaches no more than nobody does.
        for change, arguments in (
            (os.setgroups, ([],)),
            (os.setresgid, (NOBODY,) * 3),
            (os.setresuid, (NOBODY,) * 3),
        ):
            with contextlib.suppress(PermissionError):
                change(*arguments)
    if sys.platform == "linux":
        _call("capset", struct.pack("=Ii", 0x20080522, 0), NO_CAPABILITIES)


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """The limits of this process, which it cannot raise again.

    Args:
        cpu_seconds: Then it is killed.
        memory_bytes: More than what the fork server has.
    """
    for number, amount in [
        *LIMITS,
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
    ]:
        _, most = resource.getrlimit(number)
        amount = amount if most == resource.RLIM_INFINITY else min(amount, most)
        # macOS knows some of them by name only.
        with contextlib.suppress(ValueError if sys.platform == "darwin" else ()):
            resource.setrlimit(number, (amount, amount))


def cpu_seconds(process: int) -> float | None:
    """CPU time that another process has used; None where the system does not say."""
    if sys.platform != "linux":
        return None
    return time.clock_gettime((~process << 3) | 2)  # the clock of clock_getcpuclockid(3)


def address_space() -> int:
    """Bytes of this process's address space; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def hook(readable: Sequence[str]) -> None:
    """Refuse in Python what the kernel here cannot refuse."""

    def refuse(event: str, arguments: tuple) -> None:
        if event in HARMLESS:
            return
        if event in READS and isinstance(arguments[0], str):
            path = os.path.realpath(arguments[0]) + os.sep
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes and any(path.startswith(folder + os.sep) for folder in readable):
                return
        raise PermissionError(f"the grader does not allow {event}")

    sys.addaudithook(refuse)
