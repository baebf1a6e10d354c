"""Each attack costs only itself: nothing gets out, no other score changes, each is explained.

All attacks are graded in one run for each level of the sandbox that works here; every test looks at
its own attack. Points of the exercises that an attack leaves alone are always earned.
"""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from instructor.grade.grade import grade
from instructor.sandbox import cage
from instructor.sandbox.box import Sandbox
from tests.instructor.attack_class import HONEST, REST, SLOW, complaints
from tests.instructor.attacks import CODE, FILES, cells
from tests.instructor.classroom import (
    HIDDEN_TEXT,
    SOLUTIONS,
    TINY,
    honest,
    other_python,
    write_class,
)
from tests.instructor.test_sandbox import running
from tools.notebooks import ROOT

MINE = f'"grader": "{os.getpid():08}"'
CHECKED = {".csv", ".html"}


STRONGEST, *BETWEEN, WEAKEST = cage.LEVELS
SEARCHES = "searches its memory for the answer"
# Of each kind one in four, and one that never ends; `make test-all` lets all of them try.
QUICK = {*[name for name in CODE if name not in SLOW][::4], SLOW[0], SEARCHES}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((STRONGEST, False), id="quick"),
        pytest.param((STRONGEST, True), id=STRONGEST, marks=pytest.mark.slow),
        *(
            pytest.param((level, False), id=level, marks=pytest.mark.slow)
            for level in (*BETWEEN, WEAKEST)
        ),
    ],
)
def attacked(request, tmp_path_factory):
    """The class of all attackers and three honest students, graded at one level."""
    level, everything = request.param
    folder = tmp_path_factory.mktemp(level)
    # Anybody may write here, so it is only the sandbox that forbids it.
    open_folder = Path(tempfile.mkdtemp(prefix="open-"))
    request.addfinalizer(lambda: shutil.rmtree(open_folder))
    os.chmod(open_folder, 0o777)
    patch = pytest.MonkeyPatch()
    patch.setattr(tempfile, "tempdir", str(folder))
    request.addfinalizer(patch.undo)
    try:
        with Sandbox(level) as sandbox:
            says = sandbox.says
            seen = MINE in running()
    except ValueError as error:
        assert "a child could" not in str(error), error  # a level that is here has to hold
        pytest.skip(str(error))
    secret = open_folder / "secret.txt"
    secret.write_text(HIDDEN_TEXT)
    os.chmod(secret, 0o644)
    canary = open_folder / "canary"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        fill = {
            "CANARY": repr(str(canary)),
            "SECRET": repr(str(secret)),
            "PORT": server.getsockname()[1],
            "PARENT": os.getpid(),
        }
        names = [*CODE, *FILES]
        ids = {name: f"a{number:03}" for number, name in enumerate(names)}
        if not everything:  # each loop costs seconds
            ids = {name: own for name, own in ids.items() if name in FILES or name in QUICK}
        files = {f"tiny_{own}.ipynb": honest(own) for own in HONEST}
        for name, own in ids.items():
            if name in CODE:
                files[f"tiny_{own}.ipynb"] = honest(own, cells(name, **fill))
            else:
                files[FILES[name].name.replace("ID", own)] = FILES[name].data
        people = {own: f"=cmd|'{name}" for name, own in ids.items()}
        arguments = write_class(folder, people | dict.fromkeys(HONEST, "@Honest"), files)
        found = grade(TINY, *arguments, level=level, weak=True)
        try:
            reached = server.accept()
        except TimeoutError:
            reached = None
    return SimpleNamespace(
        level=level,
        everything=everything,
        says=says,
        server_seen=seen,
        ids=ids,
        found=found,
        folder=folder,
        canary=canary,
        reached=reached,
        arguments=arguments,
        results={result.student_id: result for result in found.results},
    )


def test_no_other_score_changes(attacked):
    for own in HONEST:
        result = attacked.results[own]
        assert (result.score, result.flags) == (TINY.points, []), result


def test_nothing_escapes(attacked):
    assert attacked.reached is None, "a child reached the network"
    assert not attacked.canary.exists()
    assert sorted(p.name for p in attacked.canary.parent.iterdir()) == ["secret.txt"]
    for path in (attacked.folder / "out").rglob("*"):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                assert not any(HIDDEN_TEXT.encode() in archive.read(n) for n in archive.namelist())
        elif path.is_file():
            assert HIDDEN_TEXT not in path.read_text("utf-8"), path
    # The fork server, and so all that it forked, has the grader's number in its command line.
    assert attacked.server_seen and MINE not in running()


def test_same_bytes_from_a_hostile_class(attacked, tmp_path):
    if not attacked.everything:
        pytest.skip("run once, with all attacks")
    grade(TINY, *attacked.arguments[:3], tmp_path / "out/grades.csv", level=attacked.level)
    before = attacked.folder / "out"
    names = {path.relative_to(before) for path in before.rglob("*") if path.suffix in CHECKED}
    assert len(names) > 60
    # What this one answers is what it finds in memory, another thing in every run.
    own = attacked.ids[SEARCHES].encode()
    for name in sorted(name for name in names if own.decode() not in name.name):
        first, second = (
            [line for line in (place / name).read_bytes().splitlines() if not line.startswith(own)]
            for place in (before, tmp_path / "out")
        )
        assert first == second, name


def test_expected_value_is_not_in_the_child(attacked):
    result = attacked.results[attacked.ids[SEARCHES]]
    for outcome in result.marks[0].outcomes:
        if outcome.case.hidden:
            refused = attacked.level == "hook" and "does not allow gc" in outcome.reason
            assert isinstance(outcome.answer, list) or refused, outcome.reason
            assert outcome.case.expected not in (outcome.answer or [])


@pytest.mark.parametrize("name", CODE)
def test_attack_by_code(attacked, name):
    if name not in attacked.ids:
        pytest.skip("run once, with all attacks")
    result = attacked.results[attacked.ids[name]]
    says, points = CODE[name][1:]
    first, *others = result.marks
    assert sum(mark.earned for mark in others) == REST, "it cost another exercise"
    assert says and re.search(says, first.reason), first.reason
    if points is not None:
        assert first.earned == points, first.reason
    if points == 0:
        assert first.reason != "right"


@pytest.mark.parametrize("name", FILES)
def test_attack_by_file(attacked, name):
    own = attacked.ids[name]
    result = attacked.results[own]
    assert (result.status, result.score) == ("refused", 0)
    assert re.search(FILES[name].says, result.problem), result.problem
    assert any(own in file and why == result.problem for file, why in attacked.found.ungraded)
    page = attacked.folder / f"out/feedback/tiny_{own}.html"
    assert "could not be graded" in page.read_text("utf-8")


def test_nbgraders_marks_and_outputs_count_for_nothing(tmp_path):
    """Points in a notebook's metadata, a second cell of one id, outputs that say "Right"."""
    document = json.loads(honest("s1", ["def effective_batch(*_): return 0", *SOLUTIONS[1:]]))
    said = {"output_type": "stream", "name": "stdout", "text": ["Right: all 3 cases"]}
    for cell in document["cells"]:
        marks = {"grade": True, "grade_id": "one", "points": 100, "solution": False}
        cell["metadata"] = {"nbgrader": marks, "score": 100, "tags": ["graded"]}
        cell |= {"id": "same", **({"outputs": [said] * 9} if cell["cell_type"] == "code" else {})}
    document["metadata"] |= {"score": 100, "otter": {"points": 100}}
    arguments = write_class(tmp_path, {"s1": "A"}, {"s1.ipynb": json.dumps(document).encode()})
    assert grade(TINY, *arguments).results[0].score == 7


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_attacks_under_another_python(version, tmp_path):
    """What parses deeper, and what is new in it, opens no way out either."""
    if (python := other_python(version)) is None:
        pytest.skip(f"no Python {version} here")
    assert complaints(tmp_path, python=python) == []


# A Python below root's home is shown to nobody as well, to this process and those it starts.
AS_NOBODY = """
nobody="setpriv --reuid 65534 --regid 65534 --clear-groups"
if ! $nobody test -r "$BASES"; then
    keep=$(mktemp -d); trap 'umount "$keep"; rmdir "$keep"' EXIT
    mount --bind "$BASES" "$keep"
    mount -t tmpfs -o mode=755 none "/$(cut -d/ -f2 <<< "$BASES")"
    mkdir -p "$BASES"; mount --bind "$keep" "$BASES"
fi
$nobody "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another")
@pytest.mark.parametrize("version", ["3.11", "3.13"])
@pytest.mark.parametrize("level", [STRONGEST, *BETWEEN])
def test_attacks_graded_by_an_ordinary_user(level, version):
    """Where the children have the grader's own user, and nobody is root."""
    if (python := other_python(version)) is None:
        pytest.skip(f"no Python {version} here")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own is closed to others
        folder = Path(name)
        for package in ("instructor", "fitcast", "tests/instructor"):
            shutil.copytree(ROOT / package, folder / package)
        (folder / "work").mkdir()
        os.chown(folder / "work", 65534, 65534)
        folder.chmod(0o755)
        module = [sys.executable, "-B", "-m", "tests.instructor.attack_class"]
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-euc", AS_NOBODY, "-", *module]
            + [str(folder / "work"), level, python],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "BASES": str(Path(sys.base_prefix).parent)},
            capture_output=True,
            text=True,
        )
    if level == STRONGEST and "unshare" in done.stderr:
        pytest.skip("users may not make namespaces here")
    assert done.stdout == "nothing\n", done.stdout + done.stderr[-2000:]


def test_formulas_and_markup_are_text(attacked):
    with (attacked.folder / "out/grades.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            assert row["name"][:2] in ("'=", "'@")
            for cell in row.values():
                assert not re.match(r"\s*[=+\-@|%]", cell) and "\n" not in cell, cell
    for path in (attacked.folder / "out").rglob("*.html"):
        assert "<script" not in path.read_text("utf-8")


def test_report_says_which_sandbox(attacked):
    report = (attacked.folder / "out/class_report.html").read_text("utf-8")
    assert f"Sandbox in force: {attacked.says.split(':')[0]}" in report
    assert (attacked.level == "hook") == ("WEAK" in report)
