"""What the site adds to Sphinx: formulas as MathML, glossary terms linked at first use."""

import re

from docutils import nodes
from latex2mathml.converter import convert

# Where a term is a name, a link or a heading already, it stays as it is.
LEFT_ALONE = (nodes.reference, nodes.literal, nodes.literal_block, nodes.title, nodes.raw)
GLOSSARY = "lessons/glossary"
# Words that a lesson also uses for something else: a slider, a product in an MLP, LoRA's r.
HOMONYMS = {"control", "gate", "rank", "paged"}


def inline_formula(self, node: nodes.math) -> None:
    self.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def formula(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def terms(env) -> dict[str, str]:
    """The glossary's terms in lower case, each with the id of its place on the glossary's page."""
    objects = env.domaindata["std"]["objects"]
    return {
        name.lower(): place
        for (kind, name), (page, place) in objects.items()
        if kind == "term" and page == GLOSSARY and name.lower() not in HOMONYMS
    }


def link_terms(app, doctree: nodes.document, page: str) -> None:
    """Link the first use of each term of the glossary on the page of a lesson."""
    known = terms(app.env)
    if not page.startswith("lessons/") or page == GLOSSARY or not known:
        return
    where = app.builder.get_relative_uri(page, GLOSSARY)
    for text in list(doctree.findall(nodes.Text)):
        if not _inside(text, LEFT_ALONE):
            text.parent.replace(text, _linked(text.astext(), known, where))


def _inside(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def _linked(text: str, unused: dict[str, str], where: str) -> list[nodes.Node]:
    """The text in pieces, one of them a link for each term that it is the first to use."""
    longest_first = sorted(unused, key=len, reverse=True)
    pattern = rf"\b({'|'.join(map(re.escape, longest_first))})(?=s?\b)" if unused else r"(?!)"
    found = re.search(pattern, text, re.IGNORECASE)
    if not found:
        return [nodes.Text(text)]
    place = unused.pop(found[1].lower())
    link = nodes.reference("", found[1], internal=True, refuri=f"{where}#{place}", classes=["term"])
    return [
        nodes.Text(text[: found.start()]),
        link,
        *_linked(text[found.end() :], unused, where),
    ]


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    app.connect("doctree-resolved", link_terms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
