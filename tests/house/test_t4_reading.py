"""The T4 reading: twelve rows that make sense, and a row measured here as it will be there."""

import json

import nbformat
import pytest

from course_utils.data import BUNDLED
from tools import notebooks, stamp, t4_reading

TINY = {"model": BUNDLED, "micro_batch_size": 1, "sequence_length": 32}
SCRIPT = notebooks.LESSONS / "add_a_t4_reading.py"


def test_twelve_rows_are_recipes_and_none_twice():
    assert len(t4_reading.ROWS) == 12
    recipes = {t4_reading.recipe_of(row) for row in t4_reading.ROWS}
    assert len(recipes) == 12
    assert all(recipe.amp_dtype == "float16" for recipe in recipes), "a T4 has no bfloat16"


def test_rows_without_time_say_so():
    found = t4_reading.reading(minutes=0, rows=[TINY])
    assert found["rows"] == [TINY | {"error": "no time left"}]
    assert found["machine"]["python"] and json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_a_row_is_forecast_and_measured_in_a_process_of_its_own():
    (row,) = t4_reading.reading(minutes=3, rows=[TINY])["rows"]
    assert row["fits"] and row["forecast_peak_allocated_bytes"] > 0
    assert row["counted_bytes"] > 0 and row["tokens_per_second"] > 0
    assert row["peak_allocated_bytes"] is None, "no GPU here"


@pytest.mark.slow
def test_a_row_that_fails_says_why_and_the_next_one_runs(tmp_path):
    broken = t4_reading.child(TINY | {"attention": "none such"}, str(tmp_path), 120)
    assert "attention must be one of" in broken["error"]


def test_the_notebook_is_its_script_and_carries_the_stamp():
    text = SCRIPT.read_text("utf-8")
    assert stamp.lesson_source(text, SCRIPT.stem, stamp.facts()) == text
    made = notebooks.from_script(SCRIPT)
    committed = nbformat.read(SCRIPT.with_suffix(".ipynb"), as_version=4)
    assert [cell.source for cell in committed.cells] == [cell.source for cell in made.cells]
    template = (notebooks.ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text("utf-8")
    assert "## A T4 reading" in template and '"A T4 reading"' in text
