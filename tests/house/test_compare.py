"""README's comparison: its table is what the kept answers give; they can be had again."""

import json
import re

import pytest

from tools import compare
from tools.surroundings import ROOT

KEPT = json.loads(compare.ESTIMATES.read_text("utf-8"))
ROWS = compare.rows()


def test_the_table_is_made_of_the_kept_answers():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert compare.TABLE.search(readme)[0] == compare.table(), "python -m tools.compare"


def test_every_measured_row_of_the_usual_recipe_is_asked_about():
    assert len(ROWS) == len(KEPT["rows"]) == 22
    assert {row["model"] for row in ROWS} == set(compare.NAMES)


SLOW = pytest.mark.slow  # they build the 8B's meta model


@pytest.mark.parametrize(
    "name",
    ["factory", pytest.param("formula", marks=SLOW), pytest.param("accelerate", marks=SLOW)],
)
def test_answers_can_be_had_again(name):
    said = [answer[name] for answer in compare.ask((name,))]
    assert said == [answer[name] for answer in KEPT["rows"]]


def test_fitcheck_answers_the_same_again():
    pytest.importorskip("fitcheck", reason="pip install fitcheck-llm")
    assert [a["fitcheck"] for a in compare.ask(("fitcheck",))] == [
        a["fitcheck"] for a in KEPT["rows"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 5, 12, 17, 21])
def test_forecast_says_the_same_again(number):
    row = ROWS[number]
    said = compare.fitcast_bytes(row, compare.config_of(row))
    assert said == KEPT["rows"][number]["fitcast"], "python -m tools.compare --ask"


def test_a_changed_measurement_changes_the_table(monkeypatch):
    changed = [row | {"peak_allocated_bytes": 2 * row["peak_allocated_bytes"]} for row in ROWS]
    monkeypatch.setattr(compare, "rows", lambda: changed)
    (off,) = re.findall(r"`fitcast forecast` \| 22 \| ([\d.]+)%", compare.table())
    assert 49 < float(off) < 51
