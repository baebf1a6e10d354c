"""The students' archive: everything but what is the instructor's, and the same bytes each time."""

import re
import subprocess
import sys
import zipfile

import pytest

from instructor.build.release import FOLDER, main, state, student_files, write_zip
from tools.notebooks import ROOT


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "students.zip"
    assert main(["--out", str(path)]) == 0
    return path


def test_archive_is_the_commit_without_the_instructors_part(archive):
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "HEAD"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    with zipfile.ZipFile(archive) as packed:
        names = [name.removeprefix(FOLDER) for name in packed.namelist()]
        assert names == sorted(names)
        private = set(listed) - set(names)
        assert set(names) <= set(listed)
        assert private == {name for name in listed if "instructor" in name.split("/")[:2]}
        assert any(name.startswith("instructor/assignments/") for name in private)
        texts = [packed.read(name) for name in packed.namelist()]
    assert not any(b"END SOLUTION\n" in text for text in texts)


def test_archive_keeps_content_and_modes(archive):
    with zipfile.ZipFile(archive) as packed:
        ci = packed.getinfo(f"{FOLDER}.ci/run")
        assert ci.external_attr >> 16 == 0o100755
        assert packed.getinfo(f"{FOLDER}README.md").external_attr >> 16 == 0o100644
        for name in ("requirements.txt", "lessons/01_where_does_the_memory_go.ipynb"):
            committed = subprocess.run(
                ["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, check=True
            ).stdout
            assert packed.read(FOLDER + name) == committed
        readme = packed.read(f"{FOLDER}README.md").decode()
        security = packed.read(f"{FOLDER}SECURITY.md").decode()
    assert "](lessons)" in readme
    assert "](instructor" not in readme
    assert "`instructor/" not in security and "## Report a problem" in security


@pytest.mark.slow
def test_students_have_no_verbs_of_the_instructors(archive, tmp_path):
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)

    def verbs(folder):
        shown = subprocess.run(
            ["make", "help"], cwd=folder, text=True, capture_output=True, check=True
        ).stdout
        return set(re.findall(r"^  make ([\w-]+)", shown, re.MULTILINE))

    ours, theirs = verbs(ROOT), verbs(tmp_path / FOLDER)
    assert ours - theirs == {"assignment", "grade", "release"}
    assert {"lessons", "test", "lab", "bench"} <= theirs
    for tests in (
        ["tests/house/test_verbs.py", "tests/house/test_readme.py", "-k", "verb or lead_somewhere"],
        ["tests/house/test_security.py", "-k", "file or rule"],
    ):  # where there is no git
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *tests], cwd=tmp_path / FOLDER, check=True
        )


def test_same_commit_same_bytes(archive, tmp_path):
    again = tmp_path / "again.zip"
    write_zip(dict(reversed(student_files().items())), again)
    assert again.read_bytes() == archive.read_bytes()


def test_no_repository_is_said(tmp_path, monkeypatch, capsys):
    with pytest.raises(OSError, match="must be a git repository with a commit, got .*; clone"):
        student_files(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="git is not installed"):
        student_files(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("instructor.build.release.ROOT", tmp_path)
    monkeypatch.setattr("instructor.build.release.student_files", lambda: student_files(tmp_path))
    assert main([]) == 2
    assert "Nothing packed: the folder must be a git repository" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_commit_is_named_and_what_it_lacks_counted(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
        )

    git("init")
    git("commit", "--allow-empty", "--message=one")
    assert re.fullmatch(r"of commit [0-9a-f]{7,}", state(tmp_path))
    (tmp_path / "new.md").write_text("not committed")
    assert "; 1 changed file is not in it, commit first" in state(tmp_path)
