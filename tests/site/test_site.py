"""The built site in a browser: every page quiet, nothing asked of other servers, search, axe.

Needs Sphinx, Playwright and Chromium (`make test-site` brings the first two); skipped without them.
`build/axe/axe.min.js` is axe-core from npm, which the same verb fetches. The explorer has tests of
its own.
"""

import importlib.util
import subprocess
import sys

import pytest

from tests.site.serve import serving
from tools.surroundings import ROOT

pytest.importorskip("playwright", reason="make test-site")
from tests.browser.jupyterlab import FLAGS, find_browser

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BUILT = ROOT / "build" / "site"
AXE = ROOT / "build" / "axe" / "axe.min.js"
PICTURES = ROOT / "build" / "site-pictures"
FIRST_PAGE_BYTES = 500_000
# What somebody may look for, and where at least one answer must lead.
SEARCHES = {
    "gradient checkpointing": "lessons/02",
    "logits": "lessons/01",
    "loss scaling": "lessons/05",
    "effective batch": "lessons/03",
    "autocast": "lessons/04",
    "NF4": "lessons/glossary",
    "forecast_generation": "api/forecasting.generation",
    "sequence_length": "errors",
    "roster": "teach",
    "TrainRecipe": "api/recipe",
}


@pytest.fixture(scope="module")
def built():
    """The site, built anew."""
    for needed in ("sphinx", "myst_nb", "sphinx_book_theme", "playwright"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: make test-site")
    try:
        find_browser()
    except ValueError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-m", "tools.make_site"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return BUILT


@pytest.fixture(scope="module")
def site(built):
    with serving(built) as (address, sent):
        yield address, sent


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(site, browser):
    """A page that keeps what its console says and what it asks of other servers."""
    address, _ = site
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.complaints = []
    page.on(
        "console",
        lambda said: page.complaints.append(said.text) if said.type in ("error", "warning") else 0,
    )
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            None
            if asked.url.startswith((address, "data:", "blob:"))
            else page.complaints.append(f"asked for {asked.url}")
        ),
    )
    yield page
    page.close()


def pages() -> list[str]:
    found = (path.relative_to(BUILT).as_posix() for path in BUILT.rglob("*.html"))
    return sorted(name for name in found if not name.startswith("explorer/"))


def test_every_page_is_quiet_and_asks_nobody(site, page):
    for name in pages():
        page.goto(site[0] + name, wait_until="load")
        page.wait_for_timeout(50)
        assert page.complaints == [], name
    assert len(pages()) > 35


def test_first_page_is_light(site, page):
    address, sent = site
    sent.clear()
    page.goto(address, wait_until="networkidle")
    assert sum(n_bytes for _, n_bytes in sent) <= FIRST_PAGE_BYTES, sent
    assert page.locator("article h1").count() == 1


@pytest.mark.parametrize(("words", "where"), SEARCHES.items(), ids=list(SEARCHES))
def test_search_finds(site, page, words, where):
    page.goto(f"{site[0]}search.html?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results ul.search li a")
    page.wait_for_function("document.querySelector('.search-summary')?.innerText.includes('found')")
    found = page.eval_on_selector_all(
        "#search-results li a", "links => links.map(link => link.getAttribute('href'))"
    )
    assert any(where in link for link in found[:10]), found[:10]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(site, browser, scheme):
    if not AXE.exists():
        pytest.skip("build/axe/axe.min.js is not there: make test-site")
    page = browser.new_page(color_scheme=scheme)
    faults = {}
    for name in pages():
        page.goto(site[0] + name, wait_until="load")
        if found := serious_faults(page):
            faults[name] = found
    page.close()
    assert faults == {}


def serious_faults(page) -> list[str]:
    """What axe-core calls serious or critical on this page, with one place of each."""
    page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{one['id']}: {len(one['nodes'])} x, {one['nodes'][0]['html'][:160]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_planted_fault_is_found_by_axe(site, page):
    if not AXE.exists():
        pytest.skip("build/axe/axe.min.js is not there: make test-site")
    page.goto(site[0])
    page.evaluate(
        "document.querySelector('main').innerHTML += '<img src=\"/_static/favicon.svg\">'"
    )
    assert any(fault.startswith("image-alt") for fault in serious_faults(page))


@pytest.mark.parametrize("width", [380, 1280])
def test_no_page_is_wider_than_its_window(site, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    wide = {}
    for name in pages():
        page.goto(site[0] + name, wait_until="load")
        over = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        if over > 0:
            wide[name] = over
    page.close()
    assert wide == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_to_look_at(site, browser, scheme):
    """The first page, a lesson and the catalogue, for eyes; and the theme follows the reader's."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    lesson = next(name for name in pages() if name.startswith("lessons/01"))
    for name in ("index.html", lesson, "errors.html"):
        page.goto(site[0] + name, wait_until="networkidle")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        page.screenshot(path=PICTURES / f"{name.replace('/', '_')[:-5]}_{scheme}.png")
    page.close()


def test_a_lesson_starts_in_two_clicks(site, page):
    """From the front page to a lesson's notebook on Colab: the link stands in the table."""
    page.goto(site[0])
    link = page.locator("a[href*='colab.research.google.com'][href*='/lessons/01_']").first
    assert "/blob/v" in link.get_attribute("href")
    page.goto(site[0] + next(name for name in pages() if name.startswith("lessons/01")))
    for where in ("colab.research.google.com/github/", "kaggle.com/kernels/welcome?src="):
        assert page.locator(f"a.door[href*='{where}']").count() == 1
    assert page.locator("a.left-prev, a.right-next").count() >= 1
    assert page.locator("a.term[href*='glossary.html#term-']").count() >= 10
