"""What the engine refuses, read from its code: each field with its rules and what to change."""

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tools.surroundings import ROOT

MEANINGS = ROOT / "site" / "refusals.toml"
HEAD = """\
# What fitcast refuses

A question that makes no sense is answered by one sentence: `<field> must <rule>, got <value>; <what
to change>`. Here is each field with what it means, its rules, and what to change. In the command
line's messages a field bears its option's name, `--sequence-length` for `sequence_length`.
"""


@dataclass(frozen=True)
class Refusal:
    """One call of `fitcast.units.refusal`: `<field> must <rule>, got ...; <remedy>`."""

    field: str
    rule: str
    remedy: str
    module: str


def words(node: ast.expr, constants: dict[str, str]) -> str:
    """An argument as a reader meets it; what is filled in at run time stands between < and >."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        node = node.value
    said = ast.unparse(node)
    return constants.get(said, f"<{said}>")


def of_module(path: Path) -> list[Refusal]:
    """The refusals of one module, in the order of its lines."""
    tree = ast.parse(path.read_text("utf-8"))
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "refusal"
    ]
    calls.sort(key=lambda call: call.lineno)
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    module = module.removesuffix(".__init__")
    return [Refusal(*(words(call.args[i], constants) for i in (0, 1, 3)), module) for call in calls]


def all_refusals() -> list[Refusal]:
    """Every refusal of the engine, module by module."""
    paths = sorted((ROOT / "fitcast").rglob("*.py"))
    return [one for path in paths for one in of_module(path)]


def meanings() -> tuple[dict[str, str], dict[str, str]]:
    """What a field is about, by its name; and by module, where the name comes at run time."""
    found = tomllib.loads(MEANINGS.read_text("utf-8"))["meaning"]
    modules = found.pop("module")
    return found, modules


def sections(refusals: list[Refusal]) -> tuple[dict[str, list], dict[str, list]]:
    """Refusals by field, and by module those whose field is named at run time."""
    fields, modules = {}, {}
    for one in refusals:
        if "<" in one.field:
            modules.setdefault(one.module, []).append(one)
        else:
            fields.setdefault(one.field, []).append(one)
    return fields, modules


def page() -> str:
    """The catalogue, in Markdown: a section for each field, with each rule and what to change."""
    fields, modules = sections(all_refusals())
    about, about_module = meanings()
    parts = [HEAD]
    for field in sorted(fields, key=str.lower):
        parts.append(_section(f"`{field}`", about.get(field, ""), fields[field]))
    parts.append("## Fields named in the message\n\nHere one check serves several fields.\n")
    for module in sorted(modules):
        parts.append(
            _section(f"In `{module}`", about_module.get(module, ""), modules[module], level=3)
        )
    return "\n".join(parts)


def _section(title: str, about: str, refusals: list[Refusal], level: int = 2) -> str:
    rows = "\n".join(
        f"- must {_shown(one.rule)}. To change: {_shown(one.remedy)}" for one in refusals
    )
    return f"{'#' * level} {title}\n\n{about}\n\n{rows}\n"


def _shown(said: str) -> str:
    """Words in which code, and what is filled in at run time, stand apart."""
    if re.fullmatch(r"<\w+>", said):
        return "*as the message says*"
    return re.sub(r"<([^<>]+)>", r"`<\1>`", said.replace("><", "> <"))
