"""Colab: every badge and set-up cell is as stamped, and the cell does what it promises.

Here in a simulated runtime: no course_utils on the path, an empty folder, a `pip` that writes down
what it was asked for, a repository on this disk. `make test-colab` does it with Colab's packages.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from course_utils.topics import welcome
from fitcast.training import versions
from tools import closing_act, colab_leg, stamp
from tools.notebooks import LESSONS, METADATA, ROOT, lesson_scripts
from tools.reproduce import differences

SCRIPTS = lesson_scripts()
NOW = stamp.facts()
PIP = "import json, sys\nprint(json.dumps(sys.argv[1:]), file=open({log!r}, 'a'))\n"
TWICE = "import sys; cell = open(sys.argv[1]).read(); [exec(cell, {}) for _ in range(2)]"
SHOW = "\nimport course_utils; print(course_utils.__file__, len(sys.path) == len(set(sys.path)))"


def text(path) -> str:
    return path.read_text("utf-8")


def unstamped(script, source, notebook, now=NOW) -> list[str]:
    """Where a lesson's badge or set-up cell is not what `make stamp` writes."""
    found = []
    if stamp.lesson_source(source, script.stem, now) != source:
        found.append(f"{script.name} has another badge or set-up cell: make stamp")
    fresh = copy.deepcopy(notebook)
    stamp.lesson_notebook(fresh, script.stem, now)
    if fresh != notebook:
        found.append(f"{script.stem}.ipynb has another badge or set-up cell: make stamp")
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_lesson_is_stamped(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert unstamped(script, text(script), notebook) == []
    assert notebook.metadata == METADATA and METADATA["colab"]["gpuType"] == "T4"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"/blob/{NOW.tag}/", "/blob/main/"),
        ("colab.research.google.com/github/", "colab.research.google.com/gist/"),
        ("01_where", "02_where"),
        (f"-qb {NOW.tag}", "-qb v0.0.9"),
        (f"bitsandbytes=={NOW.bitsandbytes}", "bitsandbytes"),
        ("--no-deps ", ""),
        ("print(welcome())", "print('welcome')"),
    ],
    ids=["branch", "gist", "other lesson", "wrong tag", "unpinned", "with deps", "other cell"],
)
def test_planted_fault_in_badge_or_cell_is_caught(old, new):
    script = SCRIPTS[0]
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert unstamped(script, text(script).replace(old, new), notebook) != []
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)
    assert len(unstamped(script, text(script), notebook)) == 1


def test_a_lesson_without_a_badge_is_refused():
    with pytest.raises(ValueError, match="01_x must have a Colab badge .* got 0 and 1; copy both"):
        stamp.lesson_source(text(SCRIPTS[0]).replace("[![Open", "[![Start"), "01_x", NOW)


def test_stamping_needs_no_second_pass_and_leaves_outputs():
    path = SCRIPTS[1].with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    before = [cell.get("outputs") for cell in notebook.cells]
    raised = stamp.Facts(NOW.repository, "9.9.9", "1.2.3")
    stamp.lesson_notebook(notebook, SCRIPTS[1].stem, raised)
    script = jupytext.reads(stamp.lesson_source(text(SCRIPTS[1]), SCRIPTS[1].stem, raised), "py")
    assert [c.source for c in script.cells[:3]] == [c.source for c in notebook.cells[:3]]
    assert "v9.9.9" in notebook.cells[0].source and "==1.2.3" in notebook.cells[2].source
    assert [cell.get("outputs") for cell in notebook.cells] == before


@pytest.fixture
def runtime(tmp_path):
    """A runtime with the course's packages and without the course; `pip` only takes notes."""
    pip, content = tmp_path / "tools" / "pip", tmp_path / "content"
    pip.mkdir(parents=True)
    content.mkdir()
    log = tmp_path / "pip.log"
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text(PIP.format(log=str(log)))
    log.touch()
    cell = tmp_path / "cell.py"
    cell.write_text(NOW.setup)
    origin = colab_leg.publish(tmp_path, NOW)
    environment = colab_leg.surroundings(origin, NOW)
    environment["PYTHONPATH"] = os.pathsep.join([str(pip.parent), sysconfig.get_path("purelib")])

    def run(code, **changes):
        done = subprocess.run(
            # -S: no .pth file is read, so a course_utils installed for development is not there
            [sys.executable, "-S", "-c", code, cell],
            cwd=content, env=environment | changes, capture_output=True, text=True,
        )  # fmt: skip
        return done, [json.loads(line) for line in log.read_text().splitlines()]

    return run


@pytest.mark.slow
def test_set_up_cell_fetches_once(runtime, tmp_path):
    first, asked = runtime(TWICE + SHOW)
    assert first.returncode == 0, first.stderr
    wanted = ["install", "-q", "--no-deps", f"bitsandbytes=={NOW.bitsandbytes}"]
    assert asked == [wanted]
    *told, where = first.stdout.splitlines()
    assert told == [welcome.banner(), welcome.NO_GPU] * 2
    assert where == f"{tmp_path / 'content/course/course_utils/__init__.py'} True"
    course = tmp_path / "content" / "course"
    describe = ["git", "-C", course, "describe", "--tags"]
    assert subprocess.check_output(describe, text=True).strip() == NOW.tag
    assert {path.name for path in course.iterdir()} >= {"lessons", "course_utils"}


@pytest.mark.slow
def test_set_up_cell_fetches_nothing_after_a_restart(runtime):
    (first, asked), (restarted, in_all) = (runtime(TWICE + SHOW) for _ in range(2))
    assert restarted.stdout == first.stdout != "" and in_all == asked


@pytest.mark.slow
def test_moving_to_another_folder_fetches_nothing_more(runtime, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = "import os, sys; cell = open(sys.argv[1]).read(); exec(cell, {})\n"
    done, asked = runtime(moved + "os.chdir('../elsewhere'); exec(cell, {})" + SHOW)
    assert done.returncode == 0, done.stderr
    assert len(asked) == 1 and list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.slow
def test_no_network_is_told_by_git_itself(runtime, tmp_path):
    nowhere = f"url.{(tmp_path / 'nowhere').as_uri()}.insteadOf"
    done, _ = runtime(TWICE, GIT_CONFIG_KEY_0=nowhere)
    assert done.returncode != 0
    assert "does not exist" in done.stderr or "not appear to be a git repository" in done.stderr
    assert "No module named 'course_utils'" in done.stderr
    again, asked = runtime(TWICE)
    assert again.returncode == 0 and len(asked) == 2, "the next try starts over"


@pytest.mark.slow
def test_an_old_past_runtime_is_told_what_to_choose(runtime, tmp_path):
    """Colab's "Runtime version" 2026.01 as its packages say it; the sentence comes first."""
    for name, version in (("transformers", "4.57.3"), ("torch", "2.9.0+cu126")):
        old = tmp_path / "tools" / f"{name}-{version}.dist-info"
        old.mkdir()
        (old / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    done, _ = runtime(TWICE)
    assert done.returncode == 0, done.stderr
    banner, remark = done.stdout.splitlines()[:2]
    assert banner == welcome.banner()
    assert "transformers 4.57.3 (needed: 5.15)" in remark
    assert remark.startswith("This runtime is older") and "version > Latest" in remark


@pytest.mark.slow
def test_elsewhere_it_fetches_nothing():
    environment = {k: v for k, v in os.environ.items() if k != welcome.COLAB_VARIABLE}
    done = subprocess.run([sys.executable, "-c", NOW.setup], cwd=LESSONS, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.startswith(welcome.banner()), done.stderr
    assert not (LESSONS / "course").exists()


PROBE = {
    "told": [welcome.banner()] * 2,
    "frozen": [["a==1"], ["a==1", f"bitsandbytes=={NOW.bitsandbytes}"]],
    "path": ["/content", "/lib"], "course_utils": "/content/course/course_utils/__init__.py",
}  # fmt: skip
PROBE["frozen"].append(PROBE["frozen"][1])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"frozen": [["a==1"], ["a==2", PROBE["frozen"][1][1]]] + [["a==2"]]}, "'a==2'"),
        ({"frozen": [["a==1"]] * 3}, "nothing else"),
        ({"frozen": [*PROBE["frozen"][:2], ["a==1"]]}, "a second run changes packages"),
        ({"told": [welcome.banner(), ""]}, "not twice the banner"),
        ({"path": ["/content", "/content"]}, "adds to sys.path"),
        ({"course_utils": "/home/me/course_utils/__init__.py"}, "not from the clone"),
    ],
)
def test_leg_judges_what_the_cell_did(change, complaint, tmp_path):
    found = colab_leg.complaints(PROBE | change, Path("/content"), NOW)
    assert found == [] if complaint is None else complaint in " ".join(found)


def test_leg_expects_on_colab_what_the_lessons_say_there(tmp_path):
    shutil.copytree(LESSONS, tmp_path / "course" / "lessons")
    for script in SCRIPTS:
        copied = nbformat.read(colab_leg.as_on_colab(script.stem, tmp_path), as_version=4)
        ours = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
        changed = [cell.source for cell, other in zip(ours.cells, copied.cells, strict=True)
                   if cell != other]  # fmt: skip
        assert changed[0] == NOW.setup
        said = ["".join(part.get("text", part.get("text/html", ""))
                        for out in cell.get("outputs", []) for part in (out, out.get("data", {})))
                for cell in ours.cells]  # fmt: skip
        other = colab_leg.OTHERWISE.get(script.stem, {})
        assert all(any(here in shown for shown in said) for here in other)
        cells = sum(any(here in shown for here in other) for shown in said)
        assert len(changed) == 1 + cells, script.stem


@pytest.mark.parametrize("lesson", colab_leg.OTHERWISE)
def test_what_differs_on_colab_differs_in_that_alone(lesson, tmp_path):
    shutil.copytree(LESSONS, tmp_path / "course" / "lessons")
    expected = nbformat.read(colab_leg.as_on_colab(lesson, tmp_path), as_version=4)
    assert differences(expected, copy.deepcopy(expected)) == []
    for here, there in colab_leg.OTHERWISE[lesson].items():
        number = re.sub(r"\d", "7", there)  # the same form, another value
        for wrong in {here, number, there.replace("in ", "in /elsewhere")} - {there}:
            now = copy.deepcopy(expected)
            for part, kind in colab_leg.texts(now):
                part[kind] = part[kind].replace(there, wrong)
            assert len(differences(expected, now)) == 1, wrong


@pytest.mark.parametrize("said", ["RuntimeError: lost", "[transformers] `x` is deprecated", ""])
def test_no_line_on_stderr_is_looked_past(said):
    cell = new_code_cell("train()", outputs=[new_output("stream", text="done\n")])
    expected, now = new_notebook(cells=[cell]), new_notebook(cells=[copy.deepcopy(cell)])
    if said:
        now.cells[0].outputs.append(new_output("stream", name="stderr", text=f"{said}\n"))
    colab_leg.name_folder(now, Path("/content"))
    assert len(differences(expected, now)) == bool(said)


@pytest.mark.parametrize(
    ("shown", "called"),
    [
        ("in {}/lesson_07_a1b2c3_4/merged", "in /content/lesson_07_xxxxxxxx/merged"),
        ("in {}/merged", "in {}/merged"),
        ("in /tmp/lesson_07_a1b2c3_4/merged", "in /tmp/lesson_07_a1b2c3_4/merged"),
        ("2.97 GiB", "2.97 GiB"),
    ],
    ids=["a lesson's own", "none", "elsewhere", "no folder"],
)
def test_only_a_lessons_own_folder_gets_colabs_name(shown, called, tmp_path):
    printed = new_output("stream", text=shown.format(tmp_path))
    folded = new_output("display_data", data={"text/html": shown.format(tmp_path)})
    notebook = new_notebook(cells=[new_code_cell("export()", outputs=[printed, folded])])
    colab_leg.name_folder(notebook, tmp_path)
    assert [part[kind] for part, kind in colab_leg.texts(notebook)] == [called.format(tmp_path)] * 2


@pytest.mark.parametrize("here", ["Peak", "nowhere"])
def test_a_stale_difference_is_told(here, tmp_path, monkeypatch):
    shutil.copytree(LESSONS, tmp_path / "course" / "lessons")
    lesson = SCRIPTS[3].stem
    monkeypatch.setitem(colab_leg.OTHERWISE, lesson, {here: "there"})
    with pytest.raises(colab_leg.LegError, match=f"{lesson} does not show '{here}' once"):
        colab_leg.as_on_colab(lesson, tmp_path)


def test_one_failure_hides_no_other(tmp_path, monkeypatch, capsys):
    """And each lesson's check runs that lesson; what failed is told at the end."""

    def run_lesson(expected, environment):
        if expected != SCRIPTS[0].stem:
            raise colab_leg.LegError(f"{expected} differs")
        return 7

    for name in ("set_up", "run_set_up_cell", "publish", "surroundings"):
        monkeypatch.setattr(colab_leg, name, lambda *_: None)
    monkeypatch.setattr(colab_leg, "run_tests", lambda names, *_: len(names))
    monkeypatch.setattr(colab_leg, "as_on_colab", lambda lesson, folder: lesson)
    monkeypatch.setattr(colab_leg, "run_lesson", run_lesson)
    monkeypatch.setenv("JUPYTER_PATH", "")
    assert colab_leg.main(["01", "02"]) == 1
    told, failed = capsys.readouterr()
    said = [line.rpartition(", ")[0] for line in told.splitlines()[1:]]
    first, second = (script.stem for script in SCRIPTS[:2])
    tests = f"tests: {len(colab_leg.TESTS)} pass"
    assert said == [tests, "scripts: 2 run", f"{first}: 7 cells", f"{second}: FAILED"]
    assert failed == f"{second} differs\n"


def test_leg_writes_the_record_that_is_committed(tmp_path):
    colab_leg.write_record(tmp_path / "verified.json")
    written = json.loads(text(tmp_path / "verified.json"))
    assert written | {"date": versions.record()["date"]} == versions.record()
    assert written["date"] >= versions.record()["date"]


def test_leg_runs_tests_that_are_there():
    for name in (*colab_leg.TESTS, colab_leg.SCRIPT.partition("[")[0]):
        file, _, test = name.partition("::")
        assert f"\ndef {test or 'test_'}" in text(ROOT / "tests" / file), name


@pytest.mark.parametrize(
    ("body", "passes"),
    [("import apart", True), ("assert 0", False), ("import pytest; pytest.skip('no TRL')", False)],
    ids=["passed", "failed", "skipped"],
)
def test_leg_takes_no_skipped_test_for_a_passed_one(body, passes, tmp_path, monkeypatch):
    monkeypatch.setattr(colab_leg, "PYTHON", Path(sys.executable))
    (tmp_path / "course" / "tests").mkdir(parents=True)
    (tmp_path / "apart.py").touch()
    lines = ["def test_one():", "    pass", "def test_two():", f"    {body}"]
    (tmp_path / "course" / "tests" / "test_it.py").write_text("\n".join(lines))
    plain = {"PATH": os.environ["PATH"], "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    asked = (["test_it.py"], tmp_path, plain, [tmp_path])
    if passes:
        assert colab_leg.run_tests(*asked) == 2
    else:
        with pytest.raises(colab_leg.LegError, match="tests fail"):
            colab_leg.run_tests(*asked)


def test_leg_refuses_an_unknown_lesson(capsys):
    assert colab_leg.main(["77"]) == 2
    assert "LESSON must be one of 01" in capsys.readouterr().err


def stale(readme: str) -> list[str]:
    """What README shows otherwise than `make stamp` would write it; its outputs aside."""
    shown = {
        "table": (stamp.TABLE, stamp.table(SCRIPTS, NOW)),
        "picture": (stamp.PICTURE, f"![{closing_act.alt()}](docs/closing_act.svg)"),
    }
    found = {part: pattern.search(readme) for part, (pattern, _) in shown.items()}
    return [part for part, hit in found.items() if not hit or hit[0] != shown[part][1]]


def test_stamped_texts_are_up_to_date():
    assert stale(text(ROOT / "README.md")) == []
    assert stamp.citation(text(ROOT / "CITATION.cff"), NOW) == text(ROOT / "CITATION.cff")
    package = ROOT / "fitcast" / "__init__.py"
    assert stamp.package(text(package), NOW) == text(package)
    assert closing_act.svg() == text(ROOT / "docs" / "closing_act.svg"), "make stamp"


@pytest.mark.parametrize(
    ("pattern", "new", "part"),
    [
        (r"GiB, the usual recipe", "MiB, the usual recipe", "picture"),
        (r"!\[Peak[^]]*\]", "![]", "picture"),
        (r"docs/closing_act\.svg", "docs/old.svg", "picture"),
        (rf"/blob/{re.escape(NOW.tag)}/", "/blob/main/", "table"),
        (r"\| 45 \|", "| 40 |", "table"),
        (r"<!-- end of lessons -->", "", "table"),
    ],
    ids=["wrong alt", "no alt", "no picture", "badge", "minutes", "no table"],
)
def test_planted_fault_in_readme_is_caught(pattern, new, part):
    assert stale(re.sub(pattern, new, text(ROOT / "README.md"))) == [part]


def test_picture_says_what_was_recorded():
    usual, best = closing_act.extremes()
    assert usual["peak_allocated_bytes"] > 2 * best["peak_allocated_bytes"]
    alt, drawn = closing_act.alt(), closing_act.svg()
    for row in closing_act.rungs():
        assert row["name"] in alt and f">{row['name']}<" in drawn
    assert f"{best['tokens_per_second']:,.0f}<" in drawn and "Tried to allocate" in drawn


def test_changelog_begins_with_this_version():
    """Beneath what is not released yet, where there is something."""
    headings = [line for line in text(ROOT / "CHANGELOG.md").splitlines() if line[:3] == "## "]
    first = next(line for line in headings if line != "## Unreleased")
    assert re.fullmatch(rf"## {re.escape(NOW.version)} \(\d{{4}}-\d\d-\d\d\)", first)


@pytest.mark.slow
def test_leg_runs_a_lesson_on_the_kernel_of_its_environment(tmp_path, monkeypatch):
    """Here that kernel is this Python, in a runtime that says it is Colab's."""
    (tmp_path / "content").mkdir()
    monkeypatch.setattr(colab_leg, "PYTHON", Path(sys.executable))
    monkeypatch.setenv("JUPYTER_PATH", str(colab_leg.add_kernel(tmp_path)))
    code = f"import os\nprint(os.environ[{welcome.COLAB_VARIABLE!r}])"
    cell = new_code_cell(code, outputs=[new_output("stream", text="release-colab\n")])
    lesson = tmp_path / "content" / "01_x.ipynb"
    nbformat.write(new_notebook(cells=[cell]), lesson)
    environment = colab_leg.surroundings(tmp_path, NOW)
    assert colab_leg.run_lesson(lesson, environment) == 1
    for change, complaint in (("elsewhere", "01_x differs"), (None, "NameError")):
        cell.source = code if change else "missing"
        cell.outputs[0].text = change or ""
        nbformat.write(new_notebook(cells=[cell]), lesson)
        with pytest.raises(colab_leg.LegError, match=complaint):
            colab_leg.run_lesson(lesson, environment)
