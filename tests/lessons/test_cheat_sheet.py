"""The cheat sheet: its numbers are today's, and it fits one page."""

import pytest

from tools import cheat_sheet


@pytest.mark.slow
def test_page_is_what_the_course_computes_today():
    assert cheat_sheet.PAGE.read_text("utf-8") == cheat_sheet.page(), (
        "run python -m tools.cheat_sheet"
    )


def test_page_fits_one_sheet():
    lines = cheat_sheet.PAGE.read_text("utf-8").splitlines()
    assert len(lines) <= 75 and max(map(len, lines)) <= 120
