"""The sandbox's levels, each held against what it must stop; and how it is chosen."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from instructor.grade.grade import grade, main
from instructor.sandbox import cage, syscalls, talk
from instructor.sandbox.box import START, Sandbox
from instructor.sandbox.talk import End, Questions, Talk
from tests.instructor.classroom import TINY, honest, write_class
from tools.notebooks import ROOT


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
        pytest.skip(str(error))


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
    if box.level == "seccomp":
        assert first.reply["type"] == "PermissionError"
    else:
        assert (first.reply["value"], second.reply["value"]) == (["left"], [])


def test_same_order_of_a_set_and_same_chance_in_every_child(box):
    body = "import random\ndef f(): return [list({'a', 'b', 'c', 'd', 'e'}), random.random()]"
    first, second = ask(box, body, body)
    assert first.reply["value"] == second.reply["value"]
    with Sandbox(box.level) as other:
        (third,) = ask(other, body)
    assert third.reply["value"] == first.reply["value"]


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
        "            os.fstat(n)\n            found.append(n)\n        except OSError: pass\n"
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
        shutil.copytree(ROOT / "instructor", f"{folder}/instructor")
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
        (b"[" * 60_000 + b"\n", "garbage"),
        (b"9" * 60_000 + b"\n", "garbage"),
        (b'{"nonce": "other"}\n', "garbage"),
        (b"\xff\xfe\n", "garbage"),
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
