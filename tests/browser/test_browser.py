"""A learner's hour in each lesson: run it, move its controls, answer an exercise, look at it.

The order matters: one page is used from top to bottom, and the last test asks what it complained
about all the while.
"""

import re

import pytest

from .answers import ANSWERS
from .conftest import PICTURES
from .controls import Explorer
from .jupyterlab import Notebook

pytestmark = pytest.mark.timeout(1800)

# For one exercise of each lesson: what to put in place of each `...` line, once with a mistake and
# once without, and what the check says to the mistake.
EXERCISES = {
    "01": ("numbers_kept", {"attention = ...": "attention = 2 * hidden + 2 * kv",
                            "mlp = ...": "mlp = 4 * intermediate"},
           {"attention = ...": "attention = 2 * hidden + 2 * kv + heads",
            "mlp = ...": "mlp = 4 * intermediate"},
           "attention also keeps one number for each head"),
    "02": ("keep_all", {"keep_all = ...": "keep_all = [5, 4, 3, 2, 1, 0]",
                        "keep_135 = ...": "keep_135 = [4, 3, 3, 2, 2, 1]"},
           {"keep_all = ...": "keep_all = [6, 5, 4, 3, 2, 1]",
            "keep_135 = ...": "keep_135 = [4, 3, 3, 2, 2, 1]"},
           "keep_all: "),
    "03": ("loss_of_rank", {"return ...": "return loss_sum / my_tokens"},
           {"return ...": "return loss_sum * world_size / all_tokens"},
           "that is each rank's own mean"),
    "04": ("spacing", {"power = ...": "power = 0"},
           {"power = ...": "power = math.floor(math.log2(x))"}, "that is the distance at 1.0"),
    "05": ("next_state", {"    return ...\n    return ...":
                          "    return scale / 2, good_steps, True\n"
                          "    if good_steps + 1 == growth_interval:\n"
                          "        return 2 * scale, 0, False\n"
                          "    return scale, good_steps + 1, False"},
           {"    return ...\n    return ...":
            "    return scale / 2, 0, True\n"
            "    if good_steps + 1 == growth_interval:\n"
            "        return 2 * scale, 0, False\n"
            "    return scale, good_steps + 1, False"},
           "an overflow starts the count of good steps again at 0"),
    "06": ("phi_recipe", {"...  #": "exercises.PHI  #"},
           {"...  #": "replace(exercises.PHI, attention='explicit_kv', loss='chunked',\n"
                      "                     norm='native', lora_dropout=0.0)  #"},
           "the peak is"),
    "07": ("lora_parameters", {"return ...": "return layers * r * 8 * hidden"},
           {"return ...": "return layers * r * (4 * hidden + 2 * (hidden + kv))"},
           "key and value come out kv wide"),
    "08": ("sent_bytes", {"        return ...\n    return ...":
                          "        return (ranks - 1) / ranks * trained\n    return 0"},
           {"        return ...\n    return ...":
            "        return 2 * (ranks - 1) / ranks * trained\n"
            "    layers = 2 * micro_batches * (frozen + trained)\n"
            "    return (ranks - 1) / ranks * (layers + trained)"},
           "ddp: an all-reduce is two rounds"),
}  # fmt: skip
THEMES = ("JupyterLab Dark", "JupyterLab Light")


def failures(notebook: Notebook) -> list[str]:
    """What went wrong in a notebook that ran to its end, going by the file that it saves."""
    for _ in range(30):  # a reply that is on its way is not in the file; a busy machine is slow
        cells = [cell for cell in notebook.save().cells if cell.cell_type == "code"]
        if all(cell.execution_count for cell in cells):
            break
        notebook.page.wait_for_timeout(2000)
    found = (
        []
        if [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
        else [f"not every cell ran, once, in order: {[cell.execution_count for cell in cells]}"]
    )
    for cell in cells:
        meant = "raises-exception" in cell.metadata.get("tags", [])
        raised = [o.ename for o in cell.outputs if o.output_type == "error"]
        if bool(raised) != meant:
            found.append(f"{cell.source.splitlines()[0]!r} raised {raised or 'nothing'}")
    return found


def test_runs_to_its_end(lesson):
    assert failures(lesson) == []


def test_controls_move_the_picture(lesson):
    """Every control by keyboard alone, then by mouse."""
    found = lesson.page.locator(".jupyter-widgets.widget-vbox")
    assert found.count() == 1
    explorer = Explorer(lesson.page, found)
    assert explorer.complaints() == []


def test_answered_wrongly_then_rightly(lesson):
    name, wrong, right, words = EXERCISES[lesson.number]
    cells = lesson.stored().cells
    (number,) = [n for n, cell in enumerate(cells) if name in cell.source
                 and "exercise" in cell.metadata.get("tags", [])]  # fmt: skip
    assert "check" in cells[number + 1].metadata.tags
    assert "Not attempted yet" in lesson.output(number + 1)
    for answer, opening in ((wrong, f"Not yet: {words}"), (right, "Right: ")):
        source = cells[number].source
        for gap, filling in answer.items():
            assert gap in source
            source = source.replace(gap, filling)
        lesson.write(number, source)
        lesson.run_from(number, 2)
        assert lesson.output(number + 1).startswith(opening)
    assert lesson.save().cells[number].source == source


def test_every_other_exercise_accepts_its_reference(lesson):
    cells = lesson.stored().cells
    marked = [cell.metadata.get("tags", []) for cell in cells]
    answers = ANSWERS[lesson.number]
    assert len(answers) + 1 == sum("exercise" in each for each in marked)
    for name, answer in answers.items():
        (number,) = [n for n, cell in enumerate(cells) if "exercise" in marked[n]
                     and re.search(rf"^{name}\b", cell.source, re.MULTILINE)]  # fmt: skip
        check = next(n for n in range(number, len(cells)) if "check" in marked[n])
        lesson.write(number, answer)
        lesson.run_from(number, check - number + 1)
        assert lesson.output(check).startswith("Right: "), (name, lesson.output(check))


@pytest.mark.parametrize("theme", THEMES)
def test_stands_in_either_theme(lesson, theme):
    """The pictures are for eyes; here, that every figure is drawn, on white, within its column."""
    lesson.menu("Settings", "Theme", theme)
    lesson.page.locator(f"body[data-jp-theme-name='{theme}']").wait_for(state="attached")
    folder = PICTURES / lesson.number / theme.split()[-1].lower()
    assert lesson.photograph(folder) > 1
    figures = lesson.figures()
    assert figures and [each for each in figures if not each["fits"]] == []


def test_nothing_in_the_console(lesson):
    assert lesson.complaints == []


def test_nothing_is_fetched_but_the_badges(lesson):
    colab = "https://colab.research.google.com/assets/colab-badge.svg"
    kaggle = "https://kaggle.com/static/images/open-in-kaggle.svg"
    assert lesson.foreign <= {colab, kaggle}
