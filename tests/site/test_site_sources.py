"""The site's pages before Sphinx sees them: links, doors, the glossary, and what is refused."""

import pytest

from tools import make_site, refusals, stamp
from tools.notebooks import lesson_scripts
from tools.surroundings import ROOT

TAG = stamp.facts().page("")


@pytest.mark.parametrize(
    ("target", "origin", "page", "leads_to"),
    [
        ("glossary.md#x", "lessons/01_a.ipynb", "lessons/01_a.ipynb", "glossary.md#x"),
        ("../course_utils/topics/ranks.py", "lessons/01_a.ipynb", "lessons/01_a.ipynb",
         f"{TAG}course_utils/topics/ranks.py"),
        ("lessons", "README.md", "index.md", "lessons/index.md"),
        ("lessons/cheat_sheet.md", "README.md", "index.md", "lessons/cheat_sheet.md"),
        ("../README.md", "lessons/01_a.ipynb", "lessons/01_a.ipynb", "../index.md"),
        ("../lessons/glossary.md", "instructor/README.md", "teach.md", "lessons/glossary.md"),
        ("LICENSE", "README.md", "index.md", f"{TAG}LICENSE"),
    ],
)  # fmt: skip
def test_link_leads_to_a_page_or_to_the_repository(target, origin, page, leads_to):
    assert make_site.link(target, origin, page) == leads_to


def test_links_in_code_and_to_other_servers_stay():
    shown = "[a](https://x.org/y.md) [b](#here)\n\n```\n[c](README.md)\n```\n"
    assert make_site.text(shown, "README.md", "index.md") == shown


def test_no_page_fetches_a_badge():
    badge = stamp.facts().badge("01_a")
    shown = make_site.text(f"| {badge} |", "README.md", "index.md")
    assert shown == f"| [Colab]({badge.split('](')[-1]} |"


def test_links_to_the_published_site_stay_in_the_built_one():
    home = make_site.home_address()
    shown = f'<a href="{home}explorer/">a</a> <a href="{home}">b</a> <a href="https://x.org/">c</a>'
    assert make_site.at_home(shown, make_site.BUILT / "lessons" / "01_a.html") == (
        '<a href="../explorer/index.html">a</a> <a href="../index.html">b</a> '
        '<a href="https://x.org/">c</a>'
    )


def test_every_row_of_the_glossary_becomes_an_entry():
    table = (ROOT / "lessons" / "glossary.md").read_text("utf-8")
    rows = table.count("\n| **")
    made = make_site.glossary(table)
    assert rows > 30 and made.count("\n  ") == rows
    assert "LoRA\nadapter\n  two thin" in made
    assert "| term |" not in made


def test_every_lesson_has_its_doors():
    for script in lesson_scripts():
        shown = make_site.doors(script.stem)
        assert f"/lessons/{script.stem}.ipynb" in shown
        assert "colab.research" in shown and make_site.KAGGLE in shown


def test_every_public_name_has_a_page_with_a_title():
    import fitcast

    assert set(fitcast._HOMES.values()) == set(make_site.TITLES)


def test_every_refusal_is_explained_and_nothing_else():
    fields, modules = refusals.sections(refusals.all_refusals())
    about, about_modules = refusals.meanings()
    assert set(fields) == set(about), "site/refusals.toml"
    assert set(modules) == set(about_modules), "site/refusals.toml"
    assert all(meaning.endswith(".") for meaning in [*about.values(), *about_modules.values()])


def test_the_catalogue_has_each_rule_and_remedy(tmp_path, monkeypatch):
    """A module of its own, whose refusals are known."""
    monkeypatch.setattr(refusals, "ROOT", tmp_path)
    (tmp_path / "fitcast").mkdir()
    (tmp_path / "fitcast" / "new.py").write_text(
        'AGAIN = "try again"\n'
        "def f(field, n):\n"
        '    raise refusal("loss", f"be below {n}", n, AGAIN)\n'
        '    raise refusal(field, "be one", n, "pick one")\n'
    )
    first, second = refusals.all_refusals()
    assert first == refusals.Refusal("loss", "be below <n>", "try again", "fitcast.new")
    assert second.field == "<field>"
    shown = refusals.page()
    assert "## `loss`" in shown and "- must be below `<n>`. To change: try again" in shown
    assert "### In `fitcast.new`" in shown


def test_a_real_refusal_is_in_the_catalogue():
    from fitcast import TrainRecipe

    with pytest.raises(ValueError) as caught:
        TrainRecipe(model="llama-3.2-1b", lora_rank=None)
    field, rule = str(caught.value).split(", got")[0].split(" must ")
    assert any((one.field, one.rule) == (field, rule) for one in refusals.all_refusals())
