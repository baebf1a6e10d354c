"""The calls to Linux that a student's code may make, as a seccomp filter; all others fail.

A list of what is allowed, because a list of what is forbidden is out of date with the next kernel.
No process, thread, socket, signal, mount, trace or new program is on it. Calls that are many calls
in one (`fcntl`, `ioctl`) are allowed for the commands that Python needs: others make the kernel
signal another process when data comes, enlarge pipes, lock or watch files. So are those that may
ask about another process (clocks, affinity): for its own alone.
Linux itself lets two calls past every filter on x86-64, `uretprobe` and `uprobe` (335 and 336, from
6.14 on): whoever makes them without a probe is killed or refused.
Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Sequence

# name: number on x86-64, number on arm64 (0 stands for none there; read has its own line)
ALLOWED = {
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "dup": (32, 23),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "getcwd": (79, 17),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "getdents64": (217, 61),
    "restart_syscall": (219, 128),
    "exit_group": (231, 94),
    "get_mempolicy": (239, 236),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "dup3": (292, 24),
    "getrandom": (318, 278),
    "rseq": (334, 293),
    # x86-64 alone has these older forms
    "poll": (7, 0),
    "select": (23, 0),
    "dup2": (33, 0),
    "time": (201, 0),
}
READ = (0, 63)
# Allowed for some values of an argument, of which the kernel takes the low half: number, the
# argument's place, values. Numbers: include/uapi/asm-generic/fcntl.h, ioctls.h;
# include/uapi/linux/fcntl.h, time.h. A negative clock is another process's.
CLOCKS = (0, 1, 2, 3, 4, 5, 6, 7, 11)
CHOSEN = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 1030)),  # F_DUPFD, _GETFD, _SETFD, _GETFL, F_DUPFD_CLOEXEC
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x5450, 0x5451)),  # TCGETS, TIOCGWINSZ, FION-, FIOCLEX
    "clock_gettime": ((228, 113), 0, CLOCKS),
    "clock_getres": ((229, 114), 0, CLOCKS),
    "clock_nanosleep": ((230, 115), 0, CLOCKS),
    "sched_getaffinity": ((204, 123), 0, (0,)),  # its own
    # Not to have memory merged with others', whose timing would tell what they hold.
    "madvise": ((28, 233), 2, (0, 1, 2, 3, 4, 8, 14, 15)),  # MADV_NORMAL to _DONTNEED, _FREE, pages
}
# Allowed with one of these bits in an argument. A futex that is not private wakes whoever waits at
# the same place of a file, a library that all have mapped.
FLAGGED = {"futex": ((202, 98), 1, 128)}  # FUTEX_PRIVATE_FLAG
# What asks about a file by its name: where files may be opened.
ABOUT_FILES = {
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "statx": (332, 291),
    "faccessat2": (439, 439),
    "stat": (4, 0),
    "lstat": (6, 0),
    "access": (21, 0),
    "readlink": (89, 0),
}
# Where Landlock decides which files are reached: to open one that is there. Number, flags' place.
OPENING = {"openat": ((257, 56), 2), "open": ((2, 0), 1)}
MAKING = 0o100 | 0o20000000  # O_CREAT, __O_TMPFILE
# Where a root folder of its own decides: what makes and removes files, in memory of limited size.
FILES = {
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "unlinkat": (263, 35),
    "renameat2": (316, 276),
    "renameat": (264, 38),
    "open": (2, 0),
    "rename": (82, 0),
    "mkdir": (83, 0),
    "rmdir": (84, 0),
    "unlink": (87, 0),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
# BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K of linux/bpf_common.h
LOAD, JUMP_IF_EQUAL, JUMP_IF_ANY, RETURN = 0x20, 0x15, 0x45, 0x06
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16  # offsets in `struct seccomp_data`
PASS, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # REFUSE gives EPERM
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def supported() -> bool:
    """Whether this machine's numbers are known here."""
    return platform.system() == "Linux" and platform.machine() in MACHINES


def program(files: str) -> bytes:
    """The filter, as instructions of the kernel's packet filter.

    Args:
        files: `none` can be opened; `read`, those that are there; or `all`, and new ones be made.
    """
    column, machine = MACHINES[platform.machine()]
    rows = [*ALLOWED.values(), *(FILES.values() if files == "all" else ())]
    rows += ABOUT_FILES.values() if files != "none" else ()
    plain = [READ[column], *(row[column] for row in rows if row[column])]
    guarded = [(row[column], _one_of(at, values)) for row, at, values in CHOSEN.values()]
    guarded += [(row[column], _any_of(at, bits)) for row, at, bits in FLAGGED.values()]
    if files == "read":
        guarded += [(row[column], _no_new(at)) for row, at in OPENING.values() if row[column]]
    # Jumps lead forward only: numbers, the refusal, a block for each guarded call, PASS.
    behind = len(guarded) + 1 + sum(len(block) for _, block in guarded)  # the plain numbers
    steps = [
        (LOAD, 0, 0, MACHINE),
        (JUMP_IF_EQUAL, 1, 0, machine),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    steps += [
        (JUMP_IF_EQUAL, len(plain) - 1 - index + behind, 0, number)
        for index, number in enumerate(plain)
    ]
    start = 1  # the first block stands behind the refusal
    for index, (number, block) in enumerate(guarded):
        steps.append((JUMP_IF_EQUAL, len(guarded) - 1 - index + start, 0, number))
        start += len(block)
    steps.append((RETURN, 0, 0, REFUSE))
    for _, block in guarded:
        steps += block
    steps.append((RETURN, 0, 0, PASS))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _one_of(argument: int, values: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """A block that passes the calls whose argument of that place is one of these."""
    count = len(values)
    return [
        (LOAD, 0, 0, ARGUMENTS + 8 * argument),
        *((JUMP_IF_EQUAL, count - index, 0, one) for index, one in enumerate(values)),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, PASS),
    ]


def _any_of(argument: int, bits: int) -> list[tuple[int, int, int, int]]:
    """A block that passes the calls whose argument of that place has one of these bits."""
    return [
        (LOAD, 0, 0, ARGUMENTS + 8 * argument),
        (JUMP_IF_ANY, 1, 0, bits),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, PASS),
    ]


def _no_new(argument: int) -> list[tuple[int, int, int, int]]:
    """A block that passes the calls whose flags, the argument of that place, make no file."""
    return [
        (LOAD, 0, 0, ARGUMENTS + 8 * argument),
        (JUMP_IF_ANY, 0, 1, MAKING),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, PASS),
    ]


def prepared(files: str) -> Program:
    """The filter as `restrict` takes it; made once, before the fork server forks."""
    code = program(files)
    return Program(len(code) // 8, code)


def restrict(libc: ctypes.CDLL, wanted: Program) -> None:
    """Let this process, and all that it could ever start, make no other call. For good.

    Raises:
        OSError: The kernel has no seccomp filters.
    """
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(
        SET_SECCOMP, FILTER, ctypes.byref(wanted), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp is not available")
