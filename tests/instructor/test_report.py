"""The pages: whatever a name, an answer or a file is called, it is text and nothing else."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from instructor.grade.copies import Alike
from instructor.grade.marking import mark
from instructor.grade.results import ClassResult, Result
from instructor.report.class_report import class_report
from instructor.report.feedback import feedback
from tests.instructor.classroom import SECRET, TINY, Numbers

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "' onmouseover='alert(1)",
    "--><!-- ",
    "]]><![CDATA[",
    "</title></style><script>",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "{{ ''.__class__.__mro__ }}",
    "&lt;b&gt; &amp;amp; &#60;",
    "javascript:alert(1)",
    'O\'Neil "the third"',
    "\u202egro.live\u202c",
    "\u2028 \ud800 \x01",
    "*<b>*",
    "`</code><script>`",
    "名前 Ø",
]
TAGS = [
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "h1",
    "h2",
    "p",
    "br",
    "span",
    "strong",
    "em",
    "code",
    "div",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ul",
    "li",
    "svg",
    "rect",
    "line",
    "text",
    "figure",
    "figcaption",
]
ATTRIBUTES = [
    "lang",
    "charset",
    "name",
    "content",
    "http-equiv",
    "class",
    "scope",
    "viewbox",
    "width",
    "height",
    "role",
    "aria-label",
    "x",
    "y",
    "text-anchor",
    "x1",
    "x2",
    "y1",
    "y2",
]


class Page(HTMLParser):
    """A page's tags, attributes and text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.values, self.text, self.odd = set(), set(), [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.values += [value or "" for _, value in attributes]

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.odd.append(data)

    handle_decl = handle_comment

    def unknown_decl(self, data):
        self.odd.append(data)


def a_class(text):
    """A result in which every field that a student or a file can fill says `text`."""
    marks = []
    for exercise in TINY.exercises:
        cases = exercise.cases(Numbers("tiny", text, SECRET))
        error = {"error": f"ValueError: {text}", "type": "ValueError"}
        replies = [{"value": text}, *[error] * (len(cases) - 1)]
        marks.append(mark(exercise, cases, replies, [text]))
    marks[1] = replace(marks[1], outcomes=(), problem=text)
    row = {"student_id": text, "name": text}
    marks[2] = replace(marks[2], by_hand=1.0, comment=text)
    graded = Result(row, "graded", text, "", text, 0.1, text, marks, [text, text])
    refused = Result(row, "refused", text, text)
    missing = Result(row)
    alike = [Alike((text, text), text)]
    results = [graded, refused, missing]
    return graded, refused, ClassResult(results, 10.0, [(text, text)], alike, text, [text])


def shown(text):
    """What stands on the page for a text: its marks of code and emphasis are no letters."""
    return text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(text):
    graded, refused, found = a_class(text)
    for html in (feedback(TINY, graded), feedback(TINY, refused), class_report(TINY, found)):
        page = Page(html)
        assert page.tags <= set(TAGS) and page.attributes <= set(ATTRIBUTES)
        assert page.odd == ["DOCTYPE html"]
        assert shown(text) in page.text, "the name, letter by letter"
        assert not any("alert" in value or "7 * 7" in value for value in page.values)
        html.encode("utf-8")


def test_marks_of_code_and_emphasis_come_in_pairs():
    graded, _, _ = a_class("a `b` *c* d")
    assert "a <code>b</code> <em>c</em> d" in feedback(TINY, graded)
    graded, _, _ = a_class("a `b *c*")
    assert "a `b *c*" in feedback(TINY, graded)


def test_page_loads_nothing_and_runs_nothing():
    html = class_report(TINY, a_class("x")[2])
    assert "default-src 'none'" in html
    assert not re.search(r"<script|<link|<img|<iframe|src=|href=|url\(|@import", html)
