"""The release: what is refused, what is written, and a wheel that works elsewhere."""

import json
import subprocess
import sys

import pytest
import yaml

from tools import release, stamp
from tools.surroundings import ROOT

CHANGELOG = (
    "# Changelog\n\n## Unreleased\n\n- A new thing.\n\n## 0.1.0 (2026-11-22)\n\n- The first.\n"
)


@pytest.fixture
def house(tmp_path):
    """A repository of its own, clean, with something new to release."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    me = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_a_clean_tree_with_news_is_released(house):
    release.check("0.2.0", house)
    release.write("0.2.0", house, date="2026-12-01")
    assert 'version = "0.2.0"' in (house / "pyproject.toml").read_text()
    changelog = (house / "CHANGELOG.md").read_text()
    assert "## 0.2.0 (2026-12-01)\n\n- A new thing." in changelog
    assert "Unreleased" not in changelog and "## 0.1.0 (2026-11-22)" in changelog


@pytest.mark.parametrize(
    ("version", "spoil", "complaint"),
    [
        ("0.1.0", None, "VERSION must be above 0.1.0"),
        ("0.0.9", None, "VERSION must be above 0.1.0"),
        ("next", None, "VERSION must be above 0.1.0"),
        ("0.2", None, "VERSION must be above 0.1.0"),
        ("0.2.0", "tag", "VERSION must have no tag yet"),
        ("0.2.0", "dirty", "git must have nothing to commit"),
        ("0.2.0", "empty", "CHANGELOG.md must say what is new"),
    ],
)
def test_refusals(house, version, spoil, complaint):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    if spoil == "tag":
        subprocess.run([*git, "tag", "v0.2.0"], cwd=house, check=True)
    if spoil == "dirty":
        (house / "new.txt").write_text("x")
    if spoil == "empty":
        (house / "CHANGELOG.md").write_text(CHANGELOG.replace("- A new thing.\n\n", ""))
        subprocess.run([*git, "commit", "-qam", "less"], cwd=house, check=True)
    with pytest.raises(ValueError, match=complaint):
        release.check(version, house)


def test_zenodo_says_what_the_citation_says():
    zenodo = json.loads((ROOT / ".zenodo.json").read_text("utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert zenodo["title"] == citation["title"]
    assert zenodo["version"] == citation["version"] == stamp.facts().version
    assert zenodo["creators"] == [{"name": author["name"]} for author in citation["authors"]]


def test_bug_form_asks_for_the_doctor():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text("utf-8"))
    (asked,) = [part for part in form["body"] if part.get("id") == "doctor"]
    assert "fitcast doctor --json" in asked["attributes"]["label"]
    assert asked["validations"]["required"] is True


def test_a_published_tag_was_built_and_tried_first():
    workflow = yaml.safe_load((ROOT / ".github/workflows/package.yml").read_text("utf-8"))
    assert workflow["jobs"]["publish"]["needs"] == "build"
    assert {"run": "make package"} in workflow["jobs"]["build"]["steps"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_package_is_built_checked_and_answers():
    pytest.importorskip("build")
    pytest.importorskip("twine")
    done = subprocess.run(
        [sys.executable, "-m", "tools.release", "--package"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "PASSED" in done.stdout and "fits a T4" in done.stdout.splitlines()[-1]
