"""Data of one's own: three ways to say a conversation, and one sentence for what is none."""

import json
import re

import pytest

from fitcast.training.conversations import one_answer_each, question_of, read

TWO_TURNS = [
    {"role": "system", "content": "You keep it short."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 4?"},
    {"role": "assistant", "content": "8"},
]
ASKED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def jsonl(tmp_path, *rows, name="my.jsonl"):
    path = tmp_path / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": TWO_TURNS, "id": 7}, TWO_TURNS),
        ({"prompt": "2 + 2?", "completion": "4"}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
        ({"prompt": "2 + 2?", "answer": "4"}, ASKED),
        ({"instruction": "2 + 2?", "context": "", "response": "4", "category": "sums"}, ASKED),
        (
            {"instruction": "Add up.", "input": "2, 2", "output": "4"},
            [{"role": "user", "content": "Add up.\n\n2, 2"}, ASKED[1]],
        ),
    ],
)
def test_each_way_gives_messages(tmp_path, row, wanted):
    path = jsonl(tmp_path, row)
    assert read(path)["messages"][0] == wanted == read([row])["messages"][0]
    listed = tmp_path / "my.json"
    listed.write_bytes(b"\xef\xbb\xbf" + json.dumps([row]).encode())  # as Windows begins a file
    assert read(str(listed))["messages"][0] == wanted


def test_a_set_of_the_hub_is_asked_for_its_split(monkeypatch):
    import datasets

    def load_dataset(name, split):
        assert (name, split) == ("owner/set", "test")
        return datasets.Dataset.from_list([{"prompt": "2 + 2?", "completion": "4"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/set", split="test")["messages"] == [ASKED]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b'{"prompt": "2 + ', r"line 2 must be one JSON object, got .*json\.dumps"),
        (b'{"prompt": "\xff"}', "line 2 must be one JSON object"),
        (b"[1]", "line 2 must be a JSON object, got list"),
        ({"text": "2 + 2 is 4"}, "line 2 must hold messages, or .*, got the fields text; write"),
        ({"prompt": "x", "completion": None}, "got the fields prompt, completion"),
        ({"prompt": "x", "completion": " "}, "line 2, completion must not be empty"),
        ({"prompt": 4, "completion": "x"}, "line 2, prompt must be text, got 4; put quotes"),
        ({"messages": []}, "line 2, messages must be a list of messages"),
        ({"messages": "x"}, "line 2, messages must be a list of messages, got str 'x'"),
        ({"messages": ["x"]}, r"messages\[0\] must have a role and a content, got str 'x'"),
        ({"messages": [{"from": "x"}]}, r"messages\[0\] must have a role and a content, got from"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            r"messages\[0\]\.role must be one of system, user, assistant, got 'bot'; rename it",
        ),
        ({"messages": TWO_TURNS[:4]}, r"messages\[3\]\.role must be assistant in the last .*drop"),
        ({"messages": [*ASKED, TWO_TURNS[0], ASKED[1]]}, r"\[2\]\.role must not be system after"),
        (
            {"messages": [ASKED[0], {"role": "assistant", "content": ""}]},
            r"\[1\]\.content must not",
        ),
        (
            {"messages": [ASKED[0], {"role": "assistant", "content": [1]}]},
            r"\[1\]\.content must be",
        ),
    ],
)
def test_what_cannot_be_learned_names_line_field_and_remedy(tmp_path, row, said):
    path = jsonl(tmp_path, {"prompt": "2 + 2?", "completion": "4"})
    with path.open("ab") as file:
        file.write(row if isinstance(row, bytes) else json.dumps(row).encode())
    with pytest.raises(ValueError, match=rf"^my\.jsonl, {'' if 'line' in said else '.*'}{said}"):
        read(path)


def test_no_file_no_rows_and_another_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"got 'mine.jsonl'.* {re.escape(str(tmp_path))}"):
        read("mine.jsonl")
    with pytest.raises(ValueError, match="must hold at least one conversation"):
        read(jsonl(tmp_path))
    with pytest.raises(ValueError, match=r"must be a .jsonl or .json file, got 'my.csv'; datasets"):
        read(jsonl(tmp_path, {}, name="my.csv"))
    with pytest.raises(ValueError, match="my.json must hold a list of rows, got dict"):
        read(jsonl(tmp_path, {}, name="my.json"))
    assert len(read([{"prompt": "a", "completion": "b"}] * 3)) == 3


def test_one_answer_each_keeps_what_was_said_before():
    split = one_answer_each(read([{"messages": TWO_TURNS}]))["messages"]
    assert split == [TWO_TURNS[:3], TWO_TURNS]
    assert question_of(split[0]) == "You keep it short.\n2 + 2?"


def test_an_empty_system_message_is_left_out_with_a_notice(capsys):
    """Tools write one where nobody said anything; no row is worth losing to it."""
    blank = {"messages": [{"role": "system", "content": " "}, *ASKED]}
    found = read([blank, {"messages": ASKED}, {"messages": TWO_TURNS}])
    assert found["messages"][0] == found["messages"][1] == ASKED
    assert found["messages"][2][0]["role"] == "system"
    notice = "read: left out the empty system message of 1 of 3 rows\n"
    assert capsys.readouterr().out == notice
    read([{"messages": ASKED}])
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="not be system after the first"):
        read([{"messages": [*ASKED, blank["messages"][0], ASKED[1]]}])
