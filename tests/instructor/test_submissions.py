"""What a folder or a zip gives, whose it is, and what a notebook's reader finds in it."""

import json
import os
import stat
import zipfile
from datetime import datetime
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from instructor.grade import submissions
from instructor.grade.grade import grade
from instructor.grade.journal import key_of
from instructor.grade.submissions import Names, Refused, collect
from instructor.report.table import safe
from instructor.sandbox import plan, source
from tests.instructor.classroom import SOLUTIONS, TINY, honest, notebook, write_class, zipped

ROWS = [
    {"student_id": "s001", "name": "Ann Lee"},
    {"student_id": "s-02", "name": "José Núñez"},
    {"student_id": "7", "name": "Bo"},
    {"student_id": "a/b", "name": "Zoë van Dam"},
]


@pytest.mark.parametrize(
    ("path", "owners"),
    [
        ("tiny_s001.ipynb", ["s001"]),
        ("S001 (1).ipynb", ["s001"]),
        ("hw-s-02-final.ipynb", ["s-02"]),
        ("tiny_a-b-c14cdd.ipynb", ["a/b"]),
        ("Ann Lee_4012_assignsubmission_file_/tiny.ipynb", ["s001"]),  # Moodle
        ("nunezjose_4012_99_tiny-1.ipynb", ["s-02"]),  # Canvas
        ("van Dam, Zoe/x.ipynb", []),
        ("damzoevan_1_x.ipynb", ["a/b"]),
        ("7.ipynb", ["7"]),
        ("homework_7.ipynb", []),  # too short an id to be meant
        ("s0011.ipynb", []),
        ("tiny.ipynb", []),
        # The LMS's words come first, the student's own after them.
        ("Ann Lee_4012_assignsubmission_file_/tiny_s-02.ipynb", ["s001", "s-02"]),
        ("leeann_4012_99_s-02.ipynb", ["s001", "s-02"]),
    ],
)
def test_whom_a_path_names(path, owners):
    assert Names(ROWS, "tiny").of(path) == owners


def test_two_students_of_one_name_are_nobody():
    rows = [{"student_id": "s001", "name": "Ann Lee"}, {"student_id": "s002", "name": "ann LEE"}]
    assert Names(rows, "tiny").of("Ann Lee_1_x/tiny.ipynb") == []


def test_folder(tmp_path):
    (tmp_path / "outside.ipynb").write_bytes(honest("s001"))
    folder = tmp_path / "in"
    (folder / "deep/.ipynb_checkpoints").mkdir(parents=True)
    (folder / "deep/a.ipynb").write_bytes(b"a")
    (folder / "deep/.ipynb_checkpoints/a-checkpoint.ipynb").write_bytes(b"old")
    (folder / "b.ipynb").symlink_to(tmp_path / "outside.ipynb")
    (folder / "links").symlink_to(tmp_path)
    os.mkfifo(folder / "c.ipynb")
    with (folder / "d.ipynb").open("wb") as file:
        file.truncate(20 << 30)  # a hole
    (folder / "e.zip").write_bytes(b"PK")
    found = {s.name: s for s in collect(folder)}
    assert {name: s.problem for name, s in found.items()} == {
        "b.ipynb": "it is a link to another file, which is not followed",
        "c.ipynb": "it is no ordinary file",
        "d.ipynb": "it is larger than 10 MiB (20480 MiB); clear its outputs and hand it in again",
        "deep/a.ipynb": "",
        "e.zip": "it is an archive inside the archive; ask for the .ipynb itself",
        "links": "it is a link to another file, which is not followed",
    }
    assert found["deep/a.ipynb"].read() == b"a"


def test_file_that_turns_into_a_link_is_not_followed(tmp_path):
    (tmp_path / "a.ipynb").write_bytes(b"a")
    (found,) = collect(tmp_path)
    (tmp_path / "a.ipynb").unlink()
    (tmp_path / "a.ipynb").symlink_to("/etc/passwd")
    with pytest.raises(Refused, match="cannot be read"):
        found.read()


def entry(name, **fields):
    info = zipfile.ZipInfo(name, (2026, 11, 1, 12, 0, 0))
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def test_zip_entries(tmp_path):
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(entry("link.ipynb", external_attr=(stat.S_IFLNK | 0o777) << 16), "/etc")
        archive.writestr(entry("pipe.ipynb", external_attr=(stat.S_IFIFO | 0o777) << 16), "")
        archive.writestr(entry("good.ipynb"), b"good")
        archive.writestr(entry("__MACOSX/._good.ipynb"), b"x")
        archive.writestr(entry("evil\x1b[2J\n.ipynb"), b"x")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(entry("good.ipynb"), b"another")
    found = [(s.name, s.problem, s.modified) for s in collect(path)]
    noon = datetime(2026, 11, 1, 12)
    assert found == [
        ("evil\ufffd[2J\ufffd.ipynb", "", noon),
        ("good.ipynb", "", noon),
        ("good.ipynb", "the zip has two files of this name, the first one counts", noon),
        ("link.ipynb", "it is a link to another file, which is not followed", noon),
        ("pipe.ipynb", "it is no ordinary file", noon),
    ]


def test_damaged_and_encrypted_entries(tmp_path):
    data = bytearray(zipped({"a.ipynb": b"a" * 100, "b.ipynb": b"b" * 100}))
    data[40] ^= 0xFF  # inside the compressed bytes of a
    path = tmp_path / "in.zip"
    path.write_bytes(data)
    first, second = collect(path)
    with pytest.raises(Refused, match="it is damaged"):
        first.read()
    assert second.read() == b"b" * 100
    data = bytearray(zipped({"a.ipynb": b"a"}))
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + offset] |= 1
    path.write_bytes(data)
    assert "encrypted" in collect(path)[0].problem


def test_zip_that_lies_about_a_size_is_not_unpacked(tmp_path):
    data = bytearray(zipped({"a.ipynb": bytes(50 << 20)}))
    for mark, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        place = data.index(mark) + offset
        data[place : place + 4] = (1000).to_bytes(4, "little")
    path = tmp_path / "in.zip"
    path.write_bytes(data)
    (found,) = collect(path)
    with pytest.raises(Refused, match="damaged"):
        found.read()


def test_too_many_files_are_the_wrong_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(submissions, "MOST_FILES", 2)
    for name in "abc":
        (tmp_path / f"{name}.ipynb").touch()
    with pytest.raises(ValueError, match="submissions must be at most 2 files"):
        collect(tmp_path)


def graded(tmp_path, files, people=None):
    people = people or {"s001": "Ann Lee", "s002": "Bo Chan"}
    found = grade(TINY, *write_class(tmp_path, people, files))
    return found, {result.student_id: result for result in found.results}


WRONG = ["def effective_batch(a, b, c):\n    return 0", *SOLUTIONS[1:]]


def test_lms_name_goes_before_what_the_notebook_says(tmp_path):
    """Somebody who writes another's id into a notebook changes nothing for the other."""
    found, results = graded(
        tmp_path,
        {
            "Ann Lee_1_assignsubmission_file_/tiny.ipynb": honest("s001"),
            "Bo Chan_2_assignsubmission_file_/tiny_s001.ipynb": honest("s001", WRONG),
        },
    )
    assert (results["s001"].score, results["s001"].flags) == (10, [])
    assert results["s002"].score == 7
    assert any("the notebook says STUDENT_ID 's001'" in flag for flag in results["s002"].flags)
    assert any("also names s001" in flag for flag in results["s002"].flags)


def test_claim_against_a_named_file_is_not_graded(tmp_path):
    found, results = graded(
        tmp_path, {"tiny_s001.ipynb": honest("s001", WRONG), "untitled.ipynb": honest("s001")}
    )
    assert results["s001"].score == 7
    assert (
        "untitled.ipynb",
        "it says STUDENT_ID s001, whose file is another one",
    ) in found.ungraded
    assert any("untitled.ipynb" in flag for flag in results["s001"].flags)


def test_two_claims_cannot_spoil_each_other(tmp_path):
    _, results = graded(tmp_path, {"a.ipynb": honest("s001"), "b.ipynb": honest("s001", WRONG)})
    assert (results["s001"].score, results["s001"].file) == (10, "a.ipynb")
    assert any("2 files, the best one counts" in flag for flag in results["s001"].flags)


def test_refused_second_file_does_not_cost_the_first(tmp_path):
    _, results = graded(
        tmp_path,
        {"tiny_s001.ipynb": honest("s001"), "x/s001.ipynb": b"no JSON", "x/s001.pdf": b"%PDF"},
    )
    assert (results["s001"].status, results["s001"].score) == ("graded", 10)
    assert sum("refused" in flag for flag in results["s001"].flags) == 2


def test_id_from_the_notebook_where_the_name_says_nothing(tmp_path):
    found, results = graded(
        tmp_path,
        {
            "untitled.ipynb": honest(" S002 "),
            "other.ipynb": honest("s999"),
            "blank.ipynb": honest("..."),
        },
    )
    assert results["s002"].score == 10 and results["s001"].status == "missing"
    nobodys = "neither its name nor its STUDENT_ID is in the roster"
    assert found.ungraded == [("blank.ipynb", nobodys), ("other.ipynb", f"{nobodys} ('s999')")]


def test_untouched_id_is_no_mismatch(tmp_path):
    _, results = graded(tmp_path, {"tiny_s001.ipynb": honest("...")})
    assert results["s001"].flags == []


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+49 30", "'+49 30"),
        ("-5", "'-5"),
        ("@x", "'@x"),
        ("  =x", "'  =x"),
        ("\t=x", "'\t=x"),
        ("a\n=x", "a =x"),
        ("\uff1dx", "'\uff1dx"),
        ("Ann", "Ann"),
        ("", ""),
        ("a\ud800", "a?"),
        ("12", "12"),
    ],
)
def test_cells_are_safe_for_spreadsheets(text, cell):
    assert safe(text) == cell


@pytest.fixture
def ipython(monkeypatch):
    """The transformer that the fork server gives its children."""
    transform = TransformerManager().transform_cell
    monkeypatch.setattr(source, "TRANSFORM", [transform])


def read(cells, functions=("f",)):
    return plan.read(notebook(cells), list(functions))["functions"]


def statements(cells, at=0):
    """What the function cannot do without: `[cell, text]` of each."""
    about = plan.read(notebook(cells), ["f"])
    return [about["statements"][number] for number in about["functions"]["f"]["plans"][at][1]]


def texts(cells):
    return [text.strip() for _, text in statements(cells)]


def runs(cells, at=0):
    """Numbers of the statements that run before the function is called."""
    cut, must = read(cells)["f"]["plans"][at]
    return sorted({*range(cut), *must})


def test_takes_what_the_function_needs_and_no_more(ipython):
    found = texts(
        [
            "import math\nimport torch\nmodel = torch.nn.Linear(9, 9)\nRATE = 2",
            "%pip install nothing\n!ls\nfiles = !ls\nmath?\n%time x = 1\nPLAN = {'a': RATE}",
            "%%bash\nrm -rf /",
            "%%time\ndef helper(x: torch.Tensor) -> 'y':\n    model = 3\n"
            "    return math.ceil(x) * RATE",
            "helper(3)\nfor i in range(10**9): pass",
            "class Unused: pass",
            "@decorate\ndef f(x):\n    return [helper(i) for i in x], PLAN",
            "def decorate(g): return g",
        ]
    )
    assert [t.split("\n")[0] for t in found] == [
        "import math",
        "RATE = 2",
        "PLAN = {'a': RATE}",
        "def helper(x: torch.Tensor) -> 'y':",
        "@decorate",
        "def decorate(g): return g",
    ]


def test_all_that_binds_a_name_is_taken_in_order():
    assert texts(["x = 1", "x += 1", "def f(): return x", "x = 5"]) == [
        "x = 1",
        "x += 1",
        "def f(): return x",
    ]
    assert texts(["def f(): return x", "x = 5", "x += 1"]) == [
        "def f(): return x",
        "x = 5",
        "x += 1",
    ]
    assert texts(["from math import *", "def f(x): return floor(x)"])[0] == "from math import *"
    assert texts(["from math import *", "def f(x): return abs(x)"]) == ["def f(x): return abs(x)"]
    assert texts(["f = lambda x: x"]) == ["f = lambda x: x"]
    assert texts(
        ["try:\n    import numpy as n\nexcept ImportError:\n    n = None", "def f(): return n"]
    )[0].startswith("try:")


def test_last_definition_wins_and_is_flagged():
    about = read(["def f(): return 1", "def f(): return 2"])["f"]
    assert about["notes"] == ["`f` is defined 2 times, the last one was graded"]
    about = read(["def f(): return 1", "def f(: return 2"])["f"]
    assert "does not parse, an earlier one was graded" in about["notes"][0]


CHECK = 'check("f", PUBLIC, globals())'


def test_a_function_is_seen_as_its_own_check_sees_it():
    """What stands below the check binds nothing for it, unless nothing above does."""
    cells = ["x = 1", "print(x)", "def f(): return sum([x])", CHECK, "sum = 0", "x = 2"]
    assert runs(cells) == [0, 1, 2]
    assert runs([*cells[1:], "y = 3"]) == [0, 1, 3], "x is bound below alone, `sum` is Python's"
    later = ["def f(): return ...", CHECK, "def f(): return 1"]
    assert (runs(later), runs(later, 1)) == ([0], [0, 1])
    assert read(later)["f"]["notes"] == [
        "`f` is defined 2 times, the one that its check sees was graded"
    ]
    twice = ["def f(): return ...", CHECK, "def f(): return 1", CHECK, "x = 1"]
    assert runs(twice) == [0, 1] and len(read(twice)["f"]["plans"]) == 1
    early = [CHECK, "def f(): return 1", "x = 1"]
    assert runs(early) == [0], "a check above all definitions sees none of them"
    other = ["def f(): return 1", CHECK.replace("f", "g", 1), "x = 1", CHECK]
    assert runs(other) == [0, 1]


def test_checks_of_the_assignment_are_not_run_and_others_are():
    own = CHECK.replace("PUBLIC", "MINE")
    cells = ["def f(): pass", CHECK, f" {CHECK} # done\n", f"{CHECK}; f()", own, "check('x')"]
    found = plan.read(notebook(cells), ["f"])
    assert [text.strip() for _, text in found["statements"]] == [
        "def f(): pass",
        "f()",
        own,
        "check('x')",
    ]


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (
            "!pip \\\n x\nx = 1",
            ["get_ipython().system('pip   x')", "x = 1"],
        ),
        ("%%time\nx = 1", ["x = 1"]),
        ("\n\n%%capture out\nx = 1", ["x = 1"]),
        ("%%html\n<b>x = 1</b>", []),
        ("%%bash\nrm -rf /", []),
        ("files = !ls", ["files = get_ipython().getoutput('ls')"]),
        ("x?", ["get_ipython().run_line_magic('pinfo', 'x')"]),
        ("pip install tqdm\nx = 1", ["pass", "x = 1"]),
        ("  x = 1\n  y = 2", ["x = 1", "y = 2"]),
        (">>> x = 1\n>>> y = 2", ["x = 1", "y = 2"]),
        ("x = 1; y = 'ä'; z = 3", ["x = 1", "y = 'ä'", "z = 3"]),
        ("x = 1\r\ny = 2\r", ["x = 1", "y = 2"]),
        ("await g()", ["await g()"]),
        ("return 5", ["return 5"]),
        ("x = " + " + ".join(["1"] * 3000), None),
    ],
)
def test_a_cell_is_read_as_ipython_reads_it(ipython, cell, found):
    about = plan.read(notebook([cell, "def f(): return 1"]), ["f"])
    texts_ = [text.strip() for _, text in about["statements"]][:-1]
    if found is None:  # too deep for the compiler, and nobody's loss but its own
        assert texts_ in ([], [cell])
    else:
        assert texts_ == found
    assert about["functions"]["f"]["plans"][0][1] == [len(texts_)]


@pytest.mark.parametrize(
    ("metadata", "python"),
    [
        ({"language_info": {"version": "3.12.1"}}, "3.12"),
        ({"language_info": {"version": "3.9"}}, "3.9"),
        ({"language_info": {"version": 3.12}}, ""),
        ({"language_info": {"version": "<b>"}}, ""),
        ({"language_info": []}, ""),
        ([], ""),
        ({}, ""),
    ],
)
def test_python_that_saved_it(metadata, python):
    data = json.dumps({"cells": [], "metadata": metadata}).encode()
    assert plan.read(data, [])["python"] == python


def test_line_numbers_are_those_of_the_cell():
    ((cell, text),) = statements(["x = 1", "# a comment\n\ndef f():\n    pass"])
    assert (cell, text[:2], text.count("\n")) == (3 - 1, "\n\n", 3)


def shape_of(text):
    return read([text])["f"]["shape"]


def test_shape_ignores_names_and_layout_but_not_work():
    base = "def f(a, b):\n    total = a + b  # sum\n    return total"
    assert shape_of(base) == shape_of('def f(x, y):\n    """D."""\n\n    t = (x + y)\n    return t')
    assert shape_of(base) == shape_of("def f(x: int, y) -> int:\n    t = x + y\n    return t")
    for other in (
        base.replace("a + b", "a - b"),
        base.replace("a + b", "b + a"),
        base.replace("a + b", "a + b + 1"),
        base.replace("return total", "return b"),
    ):
        assert shape_of(base) != shape_of(other)


@pytest.mark.parametrize(
    "cells",
    [
        [{"cell_type": "code", "source": 5}],
        [7],
        [{"cell_type": "code"}],
        [{"cell_type": "code", "source": ["x", 1]}],
        [{"cell_type": ["code"], "source": "x"}],
    ],
)
def test_odd_cells_are_passed_over(cells):
    data = json.dumps({"cells": cells}).encode()
    assert "problem" in plan.read(data, ["f"])["functions"]["f"]


def test_keys_tell_parts_apart():
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of(b"a") == key_of(b"a") != key_of("a")


def test_path_of_a_single_notebook(tmp_path):
    (tmp_path / "tiny_s001.ipynb").write_bytes(honest("s001"))
    assert [s.name for s in collect(Path(tmp_path, "tiny_s001.ipynb"))] == ["tiny_s001.ipynb"]


def test_one_students_folder_never_costs_the_class(tmp_path, monkeypatch):
    """A repository with thousands of files; and those that git itself keeps are none of them."""
    monkeypatch.setattr(submissions, "MOST_FILES", 12)
    monkeypatch.setattr(submissions, "MOST_NOTEBOOKS", 3)
    monkeypatch.setattr(submissions, "MOST_OTHERS", 2)
    for path in (
        *(f"class/hw-ann/.git/objects/{n}" for n in range(30)),
        *(f"class/hw-bo/deep/{n}/x{n}.ipynb" for n in range(20)),
        *(f"class/hw-bo/a{n}.txt" for n in range(20)),
        "class/hw-ann/hw.ipynb",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = {one.name: one.problem for one in collect(tmp_path)}
    assert [name for name in found if "ann" in name] == ["class/hw-ann/hw.ipynb"]
    assert sum("hw-bo" in name and "..." not in name for name in found) == 5
    assert "7 more files" in found["class/hw-bo/..."] or "18 more" in found["class/hw-bo/..."]


def test_many_files_are_no_guesses(tmp_path):
    """The best of a student's files counts, so only a few are graded: the latest."""
    files = {f"s001/tiny_s001 ({n:02}).ipynb": honest("s001", WRONG) for n in range(1, 30)}
    files["s001/tiny_s001 (00).ipynb"] = honest("s001")
    found, results = graded(tmp_path, files | {"tiny_s002.ipynb": honest("s002")})
    assert (results["s001"].score, results["s002"].score) == (7, TINY.points)
    assert any("30 files, of which the 10 latest" in flag for flag in results["s001"].flags)
    assert len(found.ungraded) == 20


def test_no_page_takes_the_place_of_anothers(tmp_path):
    """A student chooses a name that looks like a platform's, and like a classmate's."""
    files = {f"{own}/a_12_34_x{own}.ipynb": honest(own) for own in ("s001", "s002")}
    graded(tmp_path, files)
    with zipfile.ZipFile(tmp_path / "out/feedback.zip") as archive:
        pages = [archive.read(name).decode() for name in archive.namelist()]
    assert [sum(f"({own})" in page for page in pages) for own in ("s001", "s002")] == [1, 1]
