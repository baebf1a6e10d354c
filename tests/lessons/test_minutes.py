"""The main path of each lesson takes 45 minutes and brings five new concepts at most."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import minutes
from tools.notebooks import lesson_scripts

MINUTES, CONCEPTS = 45, 5


@pytest.mark.parametrize("script", lesson_scripts(), ids=lambda script: script.stem)
def test_main_path_takes_what_it_says(script):
    path = minutes.measured(script)
    assert path.minutes <= MINUTES, f"{path.minutes:.1f} minutes: {path}"
    assert len(path.concepts) <= CONCEPTS, path.concepts


GLOSSARY = "| **a word** (or two) | what it means | [01](01_try.ipynb) |\n"


def cell(source: str, tag: str = "run", *outputs):
    made = new_code_cell(source, outputs=list(outputs))
    made.metadata["tags"] = [tag]
    return made


def lesson(*more):
    """Six words and one new concept, a set-up that is free, then what a test adds to it."""
    opening = "# 01 · How long?\n\n**New concepts (1):** first. Each is explained."
    cells = [new_markdown_cell(opening), new_markdown_cell("## Set up"), cell("x = 1\n" * 5)]
    return new_notebook(cells=[*cells, new_markdown_cell("## 1 · Here"), *more])


def seconds(*more) -> float:
    """What cells add to a lesson, in seconds."""
    with_them, without = (minutes.main_path(lesson(*cells)).minutes for cells in (more, ()))
    return round(60 * (with_them - without), 6)


def stream(text: str):
    return new_output("stream", name="stdout", text=text)


def shown(**data: str):
    names = {"html": "text/html", "plain": "text/plain", "png": "image/png"}
    return new_output("display_data", {names[kind]: value for kind, value in data.items()})


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (new_markdown_cell("one two three"), 1.0),
        (new_markdown_cell("one [two](https://example.org/a/b) – three"), 1.0),
        (new_markdown_cell("<details><summary>Hint 1</summary>fold\nit</details>"), 0),
        (new_markdown_cell("```python\na = 1\n\n# why\nb = 2\n```"), 10),
        (cell("a = 1\n\n# why\nb = 2"), 10),
        (cell("a = 1", "run", stream("x\n\ny\n")), 9),
        (cell("a = 1", "run", shown(plain="Figure: a bar.", png="iVBOR")), 7),
        (cell("a = 1", "run", shown(plain="?", html="<pre>a\nb</pre><p>c &lt; d</p>")), 9),
        (cell("1 / 0", "run", new_output("error", ename="E", evalue="by\nzero")), 9),
        (cell("guess = ...", "predict"), 60),
        (cell("def f():\n    ...", "exercise"), 0),
        (cell("check(f)", "check", stream("Not attempted yet\n")), 2),
        (new_markdown_cell("*Hard, 12 minutes.*"), 721),
        (new_markdown_cell("one two three\n\n## Go further\n" + "word " * 999), 1.0),
    ],
)
def test_what_a_cell_costs(more, wanted):
    assert seconds(more) == wanted


def test_behind_go_further_nothing_counts():
    end = new_markdown_cell("## Go further: optional")
    assert seconds(end, cell("a = 1"), new_markdown_cell("*Easy, 5 minutes.*")) == 0


def test_concepts_are_the_announced_and_what_is_bold_besides():
    def said(text):
        return minutes.main_path(lesson(new_markdown_cell(text)), GLOSSARY).concepts

    assert said("a word, and **the first** thing") == ("first",)
    assert said("here is **A word**") == ("first", "a word")
    assert minutes.main_path(lesson(new_markdown_cell("**a word**")), "").concepts == ("first",)


def test_it_reads_what_is_committed(capsys):
    assert minutes.main(["01"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    path = minutes.main_path(nbformat.read(lesson_scripts(["01"])[0].with_suffix(".ipynb"), 4))
    assert line[:2] == ["01", f"{path.words}"]
