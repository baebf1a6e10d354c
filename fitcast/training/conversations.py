"""Data of one's own: from a file, the hub or a list to conversations that `data.encode` labels.

A row says a conversation in one of three ways, and every row of a set in the same:

    {"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}, {"role": ...}, ...]}
    {"prompt": "...", "completion": "..."}           # text, or lists of messages as TRL has them
    {"instruction": "...", "context": "...", "response": "..."}      # as dolly and Alpaca have it

What cannot be learned from is refused at once, with its line, the field and what to change. Only an
empty system message in front is left out, with a notice: tools write it where nobody said anything.

Not modelled: pictures and sound, calls of tools, pairs of preferences, streams.

Source: TRL, "Dataset formats and types"; the column names of databricks-dolly-15k and Alpaca.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from datasets import Dataset

QUESTIONS = ("prompt", "instruction", "question")
CONTEXTS = ("context", "input")  # what an instruction is about, in a column of its own
ANSWERS = ("completion", "answer", "response", "output")
ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".json")
FORMS = 'write {"messages": [...]}, or {"prompt": "...", "completion": "..."}'


def read(source: str | Path | Dataset | Iterable[Mapping], split: str = "train") -> Dataset:
    """Every conversation of a data set, checked.

    Args:
        source: A .jsonl file (a row a line) or .json file (a list of rows); a data set's id on the
            hub, owner/name; rows, as a list of dicts or a `datasets.Dataset`.
        split: Of a data set on the hub.

    Returns:
        One column, `messages`: lists of {"role", "content"}, each ending with the assistant's.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No rows; or one that cannot be learned from. The message names the line or row,
            the field and the remedy.

    Example:
        >>> read([{"prompt": "2 + 2?", "completion": "4"}])[0]["messages"][1]["content"]
        '4'
    """
    from datasets import Dataset

    rows, blank = [], 0
    for where, row in _rows(source, split):
        messages, here = _said(row, where)
        rows.append({"messages": _checked(messages, here)})
        blank += _is_blank_system(messages[0])
    if not rows:
        raise refusal(
            "data", "hold at least one conversation", Said("an empty set"), "look at the file"
        )
    if blank:
        print(f"read: left out the empty system message of {blank} of {len(rows)} rows")
    return Dataset.from_list(rows)


def _rows(source: Any, split: str) -> Iterable[tuple[str, Any]]:
    """Each row, and how to find it."""
    if not isinstance(source, str | Path):
        return ((f"data, row {n}", row) for n, row in enumerate(source))
    path = Path(source)
    if path.suffix in SUFFIXES or path.exists():
        return _file(path)
    from datasets import load_dataset

    hub: Any = load_dataset(str(source), split=split)
    return ((f"{source}, row {n}", row) for n, row in enumerate(hub))


def _file(path: Path) -> Iterable[tuple[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"data must be a file that is there, got {str(path)!r}; this notebook looks in "
            f"{Path.cwd()}"
        )
    if path.suffix not in SUFFIXES:
        raise refusal(
            "data",
            "be a .jsonl or .json file",
            path.name,
            "datasets.load_dataset reads csv, parquet and text; give what it returns",
        )
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    if path.suffix == ".json":
        rows = _json(b"\n".join(lines), path.name, "be JSON")
        if not isinstance(rows, list):
            raise refusal(path.name, "hold a list of rows", Said(_kind(rows)), "or make it .jsonl")
        yield from ((f"{path.name}, row {n}", row) for n, row in enumerate(rows))
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path.name}, line {number}"
            yield where, _json(line, where, "be one JSON object")


def _json(text: bytes, where: str, rule: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # bytes that are not UTF-8, too
        got = Said(f"{text[:60].decode('utf-8', 'replace')!r} ({error})")
        raise refusal(where, rule, got, "write it with json.dumps, in UTF-8") from error


def conversation(row: Any, where: str = "row") -> list[dict[str, str]]:
    """The messages of a row, whichever way it says them.

    Args:
        row: As the module's head shows.
        where: How a message finds the row, as in "my.jsonl, line 7".

    Raises:
        ValueError: It cannot be learned from; the message says where and why.
    """
    return _checked(*_said(row, where))


def _said(row: Any, where: str) -> tuple[Any, str]:
    """A row's messages as they stand there, not checked yet, and where they stand."""
    if not isinstance(row, Mapping):
        raise refusal(where, "be a JSON object", Said(_kind(row)), FORMS)
    given = {name: value for name, value in row.items() if value is not None}
    if "messages" in given:
        return given["messages"], f"{where}, messages"
    question, answer = (
        next((name for name in names if name in given), None) for names in (QUESTIONS, ANSWERS)
    )
    if question is None or answer is None:
        raise refusal(
            where,
            "hold messages, or a prompt and a completion",
            Said(f"the fields {', '.join(map(str, row)) or 'none'}"),
            FORMS,
        )
    about = [given[name] for name in CONTEXTS if str(given.get(name, "")).strip()]
    messages = [
        *_messages(given[question], "user", f"{where}, {question}", about),
        *_messages(given[answer], "assistant", f"{where}, {answer}", []),
    ]
    return messages, f"{where}, {question} and {answer}"


def _messages(value: Any, role: str, where: str, about: list) -> list:
    """A prompt or a completion as messages: TRL allows text and lists of messages."""
    if isinstance(value, list):
        return value
    _require_text(value, where)
    return [{"role": role, "content": "\n\n".join([value, *about])}]


def _checked(messages: Any, where: str) -> list[dict[str, str]]:
    """Messages that a template can render and a model can learn from, and nothing beside them."""
    if not isinstance(messages, list) or not messages:
        raise refusal(where, "be a list of messages", Said(_kind(messages)), FORMS)
    for n, message in enumerate(messages):
        here = f"{where}[{n}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            got = ", ".join(map(str, message)) if isinstance(message, Mapping) else _kind(message)
            raise refusal(
                here,
                "have a role and a content",
                Said(got),
                'write {"role": "user", "content": "..."}',
            )
        if message["role"] not in ROLES:
            remedy = "rename it; a human is a user, a bot or gpt the assistant"
            raise refusal(f"{here}.role", f"be one of {', '.join(ROLES)}", message["role"], remedy)
        if message["role"] == "system" and n:
            raise refusal(
                f"{here}.role",
                "not be system after the first message",
                "system",
                "move it to the front",
            )
        if n or not _is_blank_system(message):
            _require_text(message["content"], f"{here}.content")
    if messages[-1]["role"] != "assistant":
        raise refusal(
            f"{where}[{len(messages) - 1}].role",
            "be assistant in the last message, which is what is learned",
            messages[-1]["role"],
            "add the answer, or drop the message",
        )
    return [
        {"role": message["role"], "content": message["content"]}
        for message in messages
        if not _is_blank_system(message)
    ]


def _is_blank_system(message: Mapping) -> bool:
    content = message["content"]
    return message["role"] == "system" and isinstance(content, str) and not content.strip()


def _require_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise refusal(where, "be text", value, "put quotes around it, or join its parts")
    if not value.strip():
        raise refusal(where, "not be empty", value, "fill it in, or drop the row")


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def one_answer_each(conversations: Dataset) -> Dataset:
    """Each assistant's turn as a conversation of its own, with all that was said before it.

    For templates that write earlier turns otherwise than the last one (Qwen3 drops what was thought
    in them): each row is then what the model sees when it answers. Costs the history once for each
    answer; `data.encode(..., last_answer_only=True)` learns only the last turn of each.

    Args:
        conversations: Column `messages`, as from `read`.
    """
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"messages": messages[: n + 1]}
            for messages in conversations["messages"]
            for n, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    )


def question_of(messages: list[dict[str, str]]) -> str:
    """All that is said before the last answer; of one question and its answer, the question."""
    return "\n".join(message["content"] for message in messages[:-1])
