"""The explorer's data and words; the page itself is tested in test_explorer_page."""

import json
import re
import string

import pytest

from fitcast import gpus
from tools import explorer

FOLDER = explorer.ROOT / "site" / "explorer"
LANGUAGES = ("en", "de")


@pytest.fixture(scope="module")
def data():
    return explorer.read()


def strings(language: str) -> dict[str, str]:
    text = (FOLDER / f"strings.{language}.js").read_text("utf-8")
    return json.loads(text[text.index("= {") + 2 :].rstrip().removesuffix(";"))


def test_data_are_of_this_engine(data):
    now = explorer.stamp()
    if data["stamp"]["versions"] != now["versions"]:
        pytest.skip(f"made with {data['stamp']['versions']}")
    assert data["stamp"] == now, "python tools/explorer.py --restamp"


@pytest.mark.slow
def test_a_sample_forecast_again_is_the_same(data):
    """Another sample for each engine; of the grid's recipes, whose forecast takes a second."""
    recipes = {key: nodes for key, nodes in data["rows"].items() if "gpt-oss" not in key}
    seed = data["stamp"]["engine"]
    assert explorer.forecast_again(data | {"rows": recipes}, 3, seed) == []


@pytest.mark.slow
def test_a_sample_of_the_mixture_is_the_same(data):
    mixture = {key: nodes for key, nodes in data["rows"].items() if "gpt-oss" in key}
    assert explorer.forecast_again(data | {"rows": mixture}, 2, 0) == []


def test_a_changed_node_is_found(data):
    """What the two tests above rely on."""
    key = "llama-3.2-1b|volta|attention|usual|full"
    first = json.loads(json.dumps(data["rows"][key][0]))
    first[2] += 1
    assert explorer.forecast_again(data | {"rows": {key: [first]}}, 1, 0) == [f"{key} at 1 x 512"]


def test_every_card_and_every_row_of_the_grid_is_there(data):
    assert [card["name"] for card in data["cards"]] == list(gpus.PRESETS)
    assert set(data["rows"]) == {row.key for row, _ in explorer.rows()}
    for row, cells in explorer.rows():
        nodes = [explorer.unpacked(data, packed) for packed in data["rows"][row.key]]
        for cell in set(cells) - {tuple(node["cell"]) for node in nodes}:
            assert explorer.hopeless(row, cell, nodes), (row, cell)


def test_what_was_made_is_kept_and_a_cut_line_is_not(tmp_path):
    file = tmp_path / "part.jsonl"
    file.write_text('["a", {"cell": [1, 512]}]\n["a", {"cell": [1, 1024]}]\n["a", {"ce', "utf-8")
    assert explorer.kept(file) == {"a": [{"cell": [1, 512]}, {"cell": [1, 1024]}]}


def test_all_of_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 1_500_000


def test_both_languages_say_the_same_things():
    first, *others = (strings(language) for language in LANGUAGES)
    for other in others:
        assert list(other) == list(first)
        for key, text in first.items():
            assert holes(other[key]) == holes(text), key


def holes(text: str) -> set[str | None]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_text_of_the_page_is_in_the_strings():
    page = (FOLDER / "index.html").read_text("utf-8")
    script = (FOLDER / "explorer.js").read_text("utf-8")
    asked = re.findall(r'data-text="(\w+)"', page) + re.findall(r'\bt\("([\w.]+)"', script)
    assert len(asked) > 50
    assert set(asked) <= strings("en").keys()


def test_nobody_else_is_asked():
    for file in FOLDER.glob("*"):
        assert not re.search(r"(src|href)=.?(https?:)?//|@import|fetch\(", file.read_text("utf-8"))
