"""The sandbox's levels, each held against what it must stop; and how it is chosen."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from instructor.grade.grade import grade, main
from instructor.sandbox import cage, syscalls, talk
from instructor.sandbox.box import START, Sandbox, memory_bytes
from instructor.sandbox.talk import End, Questions, Talk
from tests.instructor.classroom import TINY, honest, write_class
from tools.notebooks import ROOT


def running():
    """The command lines of all processes."""
    return subprocess.run(
        ["ps", "-ewwo", "args="], capture_output=True, text=True, check=True
    ).stdout


class Ask(Questions):
    """Call a function of no arguments once."""

    def __init__(self, body, name="f"):
        super().__init__([[1, body]], name)
        self.reply = self.end = None

    def next(self):
        return [], False

    def receive(self, message):
        self.reply = message
        return None

    def ended(self, end):
        self.end = end
        return ()


def ask(box, *bodies):
    jobs = [Ask(body) for body in bodies]
    assert len(list(box.run(iter(jobs)))) == len(jobs)
    return jobs


@pytest.fixture(scope="module", params=cage.LEVELS)
def box(request):
    try:
        with Sandbox(request.param) as found:
            yield found
    except ValueError as error:
        assert "a child could" not in str(error), error  # a level that is here has to hold
        pytest.skip(str(error))


@pytest.mark.one_fast
def test_answers_and_ends(box):
    (job,) = ask(box, "def f(): return [1, 2.5, None, True, 'x', {'a': (1,)}]")
    assert job.reply["value"] == [1, 2.5, None, True, "x", {"a": [1]}]
    assert job.end == End("finished")


def test_limits_are_in_force(box):
    (job,) = ask(
        box,
        "import resource\ndef f(): return {n: resource.getrlimit(getattr(resource, n))"
        " for n in dir(resource) if n.startswith('RLIMIT')}",
    )
    if "error" in job.reply:  # the module cannot be loaded at the levels that allow no file
        (job,) = ask(box, "def f(): return len(bytearray(2 << 30))")
        assert job.reply["type"] == "MemoryError"
        return
    limits = job.reply["value"]
    for name, most in (("CORE", 0), ("NPROC", 0), ("CPU", 2), ("FSIZE", cage.FILE_BYTES)):
        assert limits[f"RLIMIT_{name}"] == [most, most]
    assert limits["RLIMIT_AS"][1] < 2 << 30


def test_children_share_nothing(box):
    write = "import os\ndef f():\n    open('left', 'w').write('x')\n    return os.listdir('.')"
    look = "import os\ndef f(): return os.listdir('.')"
    (first,) = ask(box, write)
    (second,) = ask(box, look)
    if box.level == "namespaces":
        assert (first.reply["value"], second.reply["value"]) == (["left"], [])
    else:  # where no file is its own, it makes none
        assert first.reply["type"] == "PermissionError"


def test_same_order_of_a_set_and_same_chance_in_every_child(box):
    body = "import random\ndef f(): return [list({'a', 'b', 'c', 'd', 'e'}), random.random()]"
    first, second = ask(box, body, body)
    assert first.reply["value"] == second.reply["value"]
    with Sandbox(box.level) as other:
        (third,) = ask(other, body)
    assert third.reply["value"] == first.reply["value"]


def test_addresses_are_the_same_in_every_run(box):
    """So what exhausts memory ends in one way; Python itself lies where it lay before."""
    body = "def f(): return [id(None), id(len), id(type)]"
    (first,) = ask(box, body)
    with Sandbox(box.level) as other:
        (second,) = ask(other, body)
    assert first.reply["value"] == second.reply["value"]


def test_environment_and_arguments_are_not_the_graders(box, monkeypatch):
    body = (
        "import os, sys\ndef f(): return [dict(os.environ), sorted(m for m in sys.modules "
        "if 'grad' in m or 'assignment' in m or 'marking' in m)]"
    )
    monkeypatch.setenv("SECRET_OF_THE_GRADER", "x")
    with Sandbox(box.level) as other:
        (job,) = ask(other, body)
    environment, modules = job.reply["value"]
    assert modules == []
    assert set(environment) <= {
        "PYTHONHASHSEED",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "LC_CTYPE",
        "__CF_USER_TEXT_ENCODING",
    }


def test_descriptors_are_its_own(box):
    body = (
        "import os\ndef f():\n    found = []\n    for n in range(2000):\n        try:\n"
        "            os.get_inheritable(n)\n            found.append(n)\n"
        "        except OSError: pass\n"
        "    return found"
    )
    (job,) = ask(box, body)
    assert job.reply["value"] == [0, 1, 2, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's levels")
def test_not_root_and_no_privilege(box):
    (job,) = ask(box, "import os\ndef f(): return os.getuid()")
    assert job.reply["value"] != 0
    (job,) = ask(box, "import os\ndef f(): return os.listdir('/')")
    (alone,) = ask(box, "import os\ndef f(): return os.getpid()")
    assert (alone.reply["value"] == 1) == (box.level == "namespaces"), "the first of its own tree"
    if box.level == "namespaces":  # its root folder holds Python, devices and temp alone
        assert not {"proc", "home", "etc", "sys", "var"} & set(job.reply["value"])
    else:
        assert job.reply["type"] == "PermissionError"


def test_many_at_once_and_one_that_sleeps(box):
    class Short(Ask):
        cpu_seconds = 1.0
        wall_seconds = 0.5

    slow = Short("import time\ndef f(): time.sleep(60)")
    quick = [Ask(f"def f(): return {n}") for n in range(20)]
    list(box.run([slow, *quick], at_once=3))
    assert slow.end == End("time", by_clock=True)
    assert [job.reply["value"] for job in quick] == list(range(20))


def test_child_that_waited_for_a_stopped_grader_is_asked_again(box):
    """Ctrl-Z, or a laptop that is shut: what a child lost by it is no answer of the student's."""
    if box.level != "namespaces":
        pytest.skip("the same at every level")

    class Twice(Ask):
        asked = 0

        def receive(self, message):
            self.asked += 1
            if self.asked == 1:
                time.sleep(4)  # this process does nothing; its children wait
            self.reply = message
            return self.put() if self.asked < 3 else None

    jobs = [Twice("def f(): return 1"), Ask("def f(): return 2")]
    first, second = jobs
    list(box.run(iter(jobs)))
    assert (first.reply["value"], first.end) == (1, End("finished"))
    assert second.reply["value"] == 2


@pytest.mark.one_fast  # it waits, at every level as long
def test_child_that_takes_long_to_end_has_ended_itself(box):
    """As on a busy machine: seconds between its last descriptor and its end, and no CPU time."""
    (job,) = ask(box, "import os, time\ndef f():\n    os.closerange(3, 64)\n    time.sleep(3)\n"
                 "    os._exit(3)")  # fmt: skip
    assert (job.reply, job.end) == (None, End("left", "3"))


@pytest.mark.one_fast  # it waits, at every level as long
def test_child_that_hangs_up_and_stays_is_killed(box):
    (job,) = ask(
        box, "import os, time\ndef f():\n    os.close(4)\n    os.close(3)\n    time.sleep(1000)"
    )
    assert (job.reply, job.end) == (None, End("garbage"))


def test_probe_finds_a_cage_that_leaks(monkeypatch):
    """Each level's walls are taken down in turn; the self-test has to see it."""
    if sys.platform != "linux":
        pytest.skip("Linux's levels")
    start = "from instructor.sandbox import cage; cage.{} = lambda *a, **k: None;"
    for level, wall, sees in [
        ("landlock", "landlock", "read a file of the grader"),
        ("seccomp", "syscalls.restrict", "read a file of the grader"),
        ("hook", "hook", "read a file of the grader"),
        ("landlock", "limit", "take 8 GiB"),
        ("landlock", "syscalls.restrict", "have the kernel signal the grader, .*call io_uring"),
        ("namespaces", "syscalls.restrict", "choose the kernel's signal, .*call userfaultfd"),
    ]:
        broken = START.replace(
            "from instructor.sandbox.forkserver",
            f"{start.format(wall)}\nfrom instructor.sandbox.forkserver",
        )
        monkeypatch.setattr("instructor.sandbox.box.START", broken)
        with pytest.raises(ValueError, match=f"a child could:.*{sees}"):
            Sandbox(level)
        monkeypatch.undo()


def test_falls_back_level_by_level(monkeypatch):
    monkeypatch.setattr(
        Sandbox,
        "_start",
        lambda self, level, real=Sandbox._start: (
            "not here" if level == "namespaces" else real(self, level)
        ),
    )
    with Sandbox() as found:
        assert found.level == ("landlock" if cage.landlock_version() else "seccomp")
        assert found.passed_over["namespaces"] == "not here"


def test_level_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="sandbox must be one of namespaces, .*got 'none'"):
        Sandbox("none")


def test_weak_level_is_refused_with_a_warning(tmp_path, capsys, monkeypatch):
    arguments = write_class(tmp_path, {"s001": "A"}, {"tiny_s001.ipynb": honest("s001")})
    with pytest.raises(ValueError, match="could read your secret"):
        grade(TINY, *arguments, level="hook")
    assert not (tmp_path / "out/grades.csv").exists()
    monkeypatch.setattr("instructor.grade.grade.load", lambda name: TINY)
    line = [
        "tiny",
        str(arguments[0]),
        "--roster",
        str(arguments[1]),
        "--secret-file",
        str(arguments[2]),
        "--out",
        str(arguments[3]),
        "--sandbox",
        "hook",
    ]
    assert main(line) == 2
    assert "--accept-weak-sandbox" in capsys.readouterr().err
    assert main([*line, "--accept-weak-sandbox"]) == 0
    assert "WEAK" in capsys.readouterr().err


@pytest.mark.parametrize("level", cage.LEVELS)
def test_same_scores_at_every_level(level, tmp_path):
    arguments = write_class(tmp_path, {"s001": "A"}, {"tiny_s001.ipynb": honest("s001")})
    try:
        found = grade(TINY, *arguments, level=level, weak=True)
    except ValueError as error:
        pytest.skip(str(error))
    assert found.results[0].score == TINY.points


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become another")
@pytest.mark.parametrize("level", ["namespaces", "landlock", "seccomp", "hook"])
def test_as_an_ordinary_user(level):
    """Root's ways in are not everybody's: the same from an account without privileges."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    if not python or subprocess.run([python, "-c", code]).returncode:
        pytest.skip("needs a Python >= 3.11 that every user may start")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may be closed to others
        for package in ("instructor", "fitcast"):
            shutil.copytree(ROOT / package, f"{folder}/{package}")
        os.chmod(folder, 0o755)
        program = (
            f"import sys; sys.path.insert(0, {folder!r})\n"
            "from instructor.sandbox.box import Sandbox\n"
            f"with Sandbox({level!r}) as box: print('in force:', box.level)"
        )
        done = subprocess.run(
            [python, "-B", "-c", program],
            capture_output=True,
            text=True,
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
            env={},
        )
    if level == "namespaces" and "unshare" in done.stderr:
        pytest.skip("users may not make namespaces here")
    assert done.stdout == f"in force: {level}\n", done.stderr


def test_filter_allows_no_process_network_or_trace():
    if not syscalls.supported():
        pytest.skip("no table for this machine")
    forbidden = {
        "socket": 41,
        "connect": 42,
        "clone": 56,
        "fork": 57,
        "vfork": 58,
        "execve": 59,
        "kill": 62,
        "ptrace": 101,
        "mount": 165,
        "unshare": 272,
        "clone3": 435,
        "process_vm_readv": 310,
        "io_uring_setup": 425,
        "bpf": 321,
        "prlimit64": 302,
    }
    allowed = {row[0] for row in [*syscalls.ALLOWED.values(), *syscalls.FILES.values()]}
    assert not allowed & set(forbidden.values())
    assert 257 not in {row[0] for row in syscalls.ALLOWED.values()}, "files are a choice"
    guarded = {"fcntl": 72, "ioctl": 16, "prctl": 157, "arch_prctl": 158}
    assert not allowed & set(guarded.values())


def test_no_other_call_is_answered(box):
    """Every number that is not in the lists, and of the other ABI of the machine, is refused."""
    if box.level == "hook" or platform.machine() != "x86_64":
        pytest.skip("x86-64's table, where there is a filter")
    tables = (syscalls.ALLOWED, syscalls.FILES, syscalls.ABOUT_FILES)
    listed = {row[0] for table in tables for row in table.values()} | {syscalls.READ[0]}
    for table in (syscalls.CHOSEN, syscalls.FLAGGED, syscalls.OPENING):
        listed |= {row[0][0] for row in table.values()}
    past_all_filters = {335, 336}  # uretprobe, uprobe
    plain = set(range(600)) - listed - past_all_filters
    other = {0x40000000 + number for number in range(600)}  # x32
    (job,) = ask(
        box,
        "import ctypes\ndef f():\n    libc, answered = ctypes.CDLL(None, use_errno=True), []\n"
        f"    for number in {sorted(plain | other)}:\n"
        "        done = libc.syscall(number, *[ctypes.c_long(0)] * 6)\n"
        "        if done != -1 or ctypes.get_errno() != 1: answered.append(number)\n"
        "    return answered",
    )
    if job.reply.get("type") == "ModuleNotFoundError":
        pytest.skip("ctypes cannot be loaded where no file can be opened")
    assert job.reply["value"] == []


# by fcntl.h, fcntl(2) and asm-generic/ioctls.h, sockios.h: what signals, enlarges, locks, watches
OTHERS = {
    "fcntl F_SETOWN": "fcntl.fcntl(3, 8, PARENT)",
    "fcntl F_SETOWN_EX": "fcntl.fcntl(3, 15, struct.pack('ii', 1, PARENT))",
    "fcntl F_SETSIG": "fcntl.fcntl(3, 10, 9)",
    "fcntl F_SETFL O_ASYNC": "fcntl.fcntl(3, 4, 0o20002)",
    "fcntl F_NOTIFY": "fcntl.fcntl(0, 1026, 1)",
    "fcntl F_SETLEASE": "fcntl.fcntl(0, 1024, 0)",
    "fcntl F_SETLK": "fcntl.fcntl(1, 6, struct.pack('hhqqi', 1, 0, 0, 0, 0))",
    "fcntl F_OFD_SETLK": "fcntl.fcntl(1, 37, struct.pack('hhqqi', 1, 0, 0, 0, 0))",
    "fcntl F_SETPIPE_SZ": "fcntl.fcntl(4, 1031, 1 << 20)",
    "fcntl F_ADD_SEALS": "fcntl.fcntl(1, 1033, 1)",
    "fcntl beyond 32 bits": "libc.fcntl(3, ctypes.c_long((1 << 32) + 8), PARENT)",
    "ioctl FIOASYNC": "fcntl.ioctl(3, 0x5452, struct.pack('i', 1))",
    "ioctl FIOSETOWN": "fcntl.ioctl(3, 0x8901, struct.pack('i', PARENT))",
    "ioctl SIOCSPGRP": "fcntl.ioctl(3, 0x8902, struct.pack('i', PARENT))",
    "ioctl TIOCSTI": "fcntl.ioctl(0, 0x5412, b'x')",
    "futex that is shared": "libc.syscall(202, here, 1, 1)",
    "memory merged with others'": "libc.madvise(ctypes.c_void_p(0), ctypes.c_size_t(0), 12)",
    "ioctl FIONBIO": "fcntl.ioctl(3, 0x5421, struct.pack('i', 1))",
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_way_round_by_a_call_that_is_many(box, name):
    """`fcntl` once had the kernel kill others on a child's behalf (F_SETSIG 9, O_ASYNC)."""
    if box.level == "hook" and "libc" in OTHERS[name]:
        pytest.skip("a hook does not see what ctypes does")
    body = (
        "import ctypes, fcntl, struct\n"
        "def f():\n"
        "    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    here = ctypes.byref(ctypes.c_int(0))\n"
        f"    done = {OTHERS[name].replace('PARENT', str(os.getpid()))}\n"
        "    return [done, ctypes.get_errno()]"
    )
    if box.level == "hook":
        body = body.replace("    libc = ctypes.CDLL(None, use_errno=True)\n", "")
        body = body.replace("    here = ctypes.byref(ctypes.c_int(0))\n", "")
    (job,) = ask(box, body)
    if "value" in job.reply:
        assert job.reply["value"] == [-1, 1]
    else:
        assert job.reply["type"] == "PermissionError", job.reply


def test_what_python_itself_needs_of_them_is_allowed(box):
    if box.level == "hook":
        pytest.skip("a hook refuses fcntl altogether")
    body = (
        "import fcntl, os\n"
        "def f():\n"
        "    copy = os.dup(1)\n"
        "    os.set_inheritable(copy, True)\n"
        "    os.set_inheritable(copy, False)\n"
        "    return [os.get_inheritable(copy), fcntl.fcntl(copy, fcntl.F_GETFL) & 3, os.isatty(1)]"
    )
    (job,) = ask(box, body)
    assert job.reply["value"] == [False, 2, False]


@pytest.mark.parametrize(
    ("asks", "open_at"),
    [
        ("time.clock_gettime((~PARENT << 3) | 2)", {"hook"}),
        ("time.clock_getres((~PARENT << 3) | 2)", {"hook"}),
        ("list(os.sched_getaffinity(PARENT))", {"hook"}),
        ("os.stat(PATH).st_size", {"landlock", "hook"}),
        ("os.access(PATH, os.R_OK)", {"landlock", "hook"}),
    ],
)
def test_nothing_is_learnt_of_others(box, asks, open_at, tmp_path):
    """What a level does let through, it says."""
    (tmp_path / "there").write_text("x")
    asks = asks.replace("PARENT", str(os.getpid())).replace("PATH", repr(str(tmp_path / "there")))
    (job,) = ask(box, f"import os, time\ndef f(): return {asks}")
    learnt = bool(job.reply.get("value"))
    if box.level in open_at:
        assert not learnt or "a child can " in box.says or "WEAK" in box.says
    else:
        assert not learnt, job.reply


def test_its_own_clocks_are_a_childs_to_read(box):
    body = (
        "import os, time\ndef f():\n    time.sleep(0.001)\n    names = ('REALTIME', 'MONOTONIC',"
        " 'PROCESS_CPUTIME_ID', 'THREAD_CPUTIME_ID', 'BOOTTIME')\n    return [time.clock_gettime("
        "getattr(time, 'CLOCK_' + n)) > 0 for n in names] + [len(os.sched_getaffinity(0)) > 0]"
    )
    (job,) = ask(box, body)
    assert job.reply["value"] == [True] * 6


MAKES = {
    "a file": "open(PLACE + 'x', 'w')",
    "a file without a name": "os.open(PLACE, os.O_TMPFILE | os.O_RDWR)",
    "a folder": "os.mkdir(PLACE + 'x')",
    "a link": "os.symlink('x', PLACE + 'y')",
    "a hard link": "os.link('/dev/null', PLACE + 'y')",
    "a pipe": "os.mkfifo(PLACE + 'x')",
    "a device": "os.mknod(PLACE + 'x')",
}


@pytest.mark.parametrize("what", MAKES)
def test_nothing_is_made_outside_of_memory(box, what, tmp_path):
    if box.level == "hook" and what in ("a pipe", "a device"):
        pytest.skip("a hook is not told of it")
    os.chmod(tmp_path, 0o777)
    for place in (f"{tmp_path}/", "/tmp/", "/dev/shm/"):
        make = MAKES[what].replace("PLACE", repr(place))
        (job,) = ask(box, f"import os\ndef f():\n    {make}\n    return 1")
        own = box.level == "namespaces" and place == "/tmp/" and "link" not in what
        if own and what in ("a file", "a folder", "a file without a name"):
            continue  # its own temp folder, in memory
        assert job.reply.get("type") in ("PermissionError", "FileNotFoundError"), (place, job.reply)
    assert list(tmp_path.iterdir()) == []


def test_temp_folder_in_memory_has_an_end(box):
    if box.level != "namespaces":
        pytest.skip("there is none at the other levels")
    body = """import os
def f():
    size = 0
    try:
        for n in range(10_000):
            with open(str(n), "wb", buffering=0) as file:
                size += file.write(bytes(1 << 16))
    except OSError as error:
        return [size, error.errno]"""
    (job,) = ask(box, body)
    size, errno = job.reply["value"]
    assert size <= 4 << 20 and errno == 28  # ENOSPC
    nest = """import os
def f():
    for n in range(5000):
        os.mkdir("d")
        os.chdir("d")"""
    (job,) = ask(box, nest)
    assert job.reply["type"] in ("OSError", "PermissionError"), job.reply


def test_all_children_together_have_a_limit(box, monkeypatch):
    if box.level != "namespaces":
        pytest.skip("the same at every level")
    running, most = set(), []
    begin, close = Sandbox._begin, Sandbox._close

    def begins(self, selector, job):
        talk = begin(self, selector, job)
        running.add(talk)
        most.append(sum(one.job.memory_bytes for one in running))
        return talk

    def closes(selector, talk):
        running.discard(talk)
        return close(selector, talk)

    monkeypatch.setattr(Sandbox, "_begin", begins)
    monkeypatch.setattr(Sandbox, "_close", staticmethod(closes))
    monkeypatch.setattr(box, "memory_bytes", 3 * Ask.memory_bytes)
    jobs = [Ask("import time\ndef f(): time.sleep(0.05)") for _ in range(12)]
    jobs[5].memory_bytes = 8 * Ask.memory_bytes  # more than there is: alone, then
    assert len(list(box.run(iter(jobs), at_once=10))) == 12
    assert sorted(set(most))[-1] == 8 * Ask.memory_bytes
    assert sorted(set(most))[-2] == 3 * Ask.memory_bytes


def test_memory_in_all_knows_the_container(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("instructor.sandbox.box.CONTAINER", limit)
    machine = memory_bytes()
    limit.write_text("max\n")
    assert memory_bytes() == machine <= 4 << 30
    limit.write_text(f"{1 << 30}\n")
    assert memory_bytes() == 512 << 20


def test_nothing_is_left_of_a_killed_grader(tmp_path):
    """SIGKILL gives nobody time to tidy up; so there is nothing to tidy."""
    code = (
        "import sys; from pathlib import Path; from instructor.sandbox.box import Sandbox\n"
        "from tests.instructor.test_sandbox import Ask\n"
        "with Sandbox() as box:\n    print('ready', flush=True)\n"
        "    list(box.run([Ask('import time\\ndef f(): time.sleep(60)')] * 3))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    process.kill()
    process.wait()
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []
    mine = f'"grader": "{process.pid:08}"'
    deadline = time.monotonic() + 10
    while mine in running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert mine not in running()


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can lose it")
@pytest.mark.parametrize("level", ["landlock", "seccomp"])
def test_root_that_may_not_become_nobody(level):
    """A container's root without CAP_SETUID and CAP_SETGID: it stays root, and reaches nothing."""
    code = (
        "import ctypes, os, sys\n"
        "for number in (6, 7): ctypes.CDLL(None).prctl(24, number, 0, 0, 0)\n"
        "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    )
    program = (
        "from instructor.sandbox.box import Sandbox\n"
        f"with Sandbox({level!r}) as box: print('in force:', box.level)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"in force: {level}\n", done.stderr


class Silent(Questions):
    """Receives what a test puts on the channel."""

    def receive(self, message):
        return None if message.get("nonce") == "n" else (_ for _ in ()).throw(ValueError("odd"))

    def next(self):
        return [], False


@pytest.mark.parametrize(
    ("data", "how"),
    [
        (b"x" * (talk.LONGEST_MESSAGE + 1), "flood"),
        (b'"' + b"x" * (talk.LONGEST_MESSAGE + 1) + b'"\n', "flood"),
        (b"[1]\n", "garbage"),
        (b"{\n", "garbage"),
        (b"[" * 60_000 + b"\n", "deep"),
        (b"9" * 60_000 + b"\n", "garbage"),
        (b'{"nonce": "other"}\n', "garbage"),
        (b"\xff\xfe\n", "garbage"),
        (b'{"nonce": "n", "value": ' + b"[" * 60 + b"]" * 60 + b"}\n", "deep"),
        (b'{"nonce": "n", "value": ' + b'{"a": ' * 900 + b"1" + b"}" * 900 + b"}\n", "deep"),
    ],
)
def test_what_a_child_may_not_send(data, how):
    orders, server = socket.socketpair()
    with orders, server:
        conversation = Talk(Silent([], "f"), orders)
        _, descriptors, _, _ = socket.recv_fds(server, 64, 2)
        child, warden = (socket.socket(fileno=d) for d in descriptors)
        with child, warden, conversation.channel, conversation.status:
            child.setblocking(False)
            while data:
                data = data[child.send(data[: 1 << 15]) :]
                conversation.read()
            assert conversation.end == End(how)
            assert warden.recv(1) == b"x", "the child is not told to end"
