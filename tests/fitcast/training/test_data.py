"""The instruction data and what makes it trainable: splits, labels, padding, clear refusals."""

import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from course_utils import data
from fitcast.training.conversations import one_answer_each, read
from fitcast.training.data import collate, encode, pack, shuffled_answers, split_heldout

TOOLS = Path(__file__).resolve().parents[3] / "tools"
TICKET = (
    "Customer: Ada\nOrder: 4821\nProduct: desk lamp\nIssue: late\nPriority: high\n"
    "Next step: trace the parcel"
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data.bundled_model_dir())


@pytest.fixture(scope="module")
def splits():
    return {split: data.load_instructions(split=split) for split in data.SPLITS}


def skeleton(row):
    """The prompt without its names, products, numbers, case and punctuation."""
    text = row["prompt"]
    for line in row["answer"].splitlines()[:3]:
        text = text.replace(line.split(": ")[1], "#")
    return " ".join(re.findall("[a-z#]+", text.lower()))


# The data


def test_committed_lines_are_what_the_script_writes(tmp_path):
    for name in ("one", "two"):
        subprocess.run(
            [sys.executable, TOOLS / "make_instructions.py", "--out", tmp_path / name],
            check=True,
            capture_output=True,
        )
    committed = (data.DATA / "instructions.jsonl").read_bytes()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == committed


def test_split_follows_the_hash_and_loses_nothing(splits):
    rows = list(map(json.loads, (data.DATA / "instructions.jsonl").read_bytes().splitlines()))
    expected = {"train": [], "heldout": []}
    for row in rows:  # the last decimal digit of the hash, written differently from corpus.py
        digit = str(int(hashlib.sha256(row["prompt"].encode()).hexdigest(), 16))[-1]
        expected["heldout" if digit == "0" else "train"].append(row)
    assert {name: list(split) for name, split in splits.items()} == expected
    assert len(rows) >= 600 and len(expected["heldout"]) >= 64


def test_no_wording_occurs_twice(splits):
    seen = [skeleton(row) for split in splits.values() for row in split]
    assert len(set(seen)) == len(seen)


def test_copied_fields_stand_in_the_prompt_and_inferred_ones_follow_one_rule(splits):
    steps = {}
    for row in [*splits["train"], *splits["heldout"]]:
        fields = data.parse_answer(row["answer"])
        for name in ("Customer", "Order", "Product"):
            assert fields[name] in row["prompt"]
        assert fields["Order"].isdigit() and row["prompt"].count(fields["Order"]) == 1
        assert steps.setdefault(fields["Issue"], fields["Next step"]) == fields["Next step"]
    assert len(steps) == len(set(steps.values())) >= 5


@pytest.mark.parametrize(
    "bad, words",
    [
        (b'{"prompt": "Where is it", "ans', "one JSON object"),
        (b'{"prompt": "Where is it"}', "a prompt and an answer"),
        (b'{"prompt": "Where is it", "answer": "  "}', "a prompt and an answer"),
        (b'{"prompt": "Where is it", "answer": 7}', "a prompt and an answer"),
        (b'["prompt", "answer"]', "a prompt and an answer"),
        (b'{"prompt": "\xff\xfe", "answer": "x"}', "one JSON object"),
        (b"", "one JSON object"),
    ],
)
def test_damaged_line_is_named(tmp_path, monkeypatch, bad, words):
    good = b'{"prompt": "a", "answer": "b"}'
    monkeypatch.setattr(data, "DATA", tmp_path)
    (tmp_path / "instructions.jsonl").write_bytes(b"\n".join([good, bad, good]))
    with pytest.raises(ValueError, match=rf"instructions\.jsonl, line 2 must .*{words}.*git "):
        data.load_instructions()


def test_missing_empty_and_unknown_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="source must be one of bundled, dolly, got 'alpaca'"):
        data.load_instructions(source="alpaca")
    with pytest.raises(ValueError, match="split must be one of train, heldout, got 'test'"):
        data.load_instructions(split="test")
    whole = (data.DATA / "instructions.jsonl").read_bytes().splitlines(keepends=True)
    monkeypatch.setattr(data, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="instructions.jsonl is missing; run `git checkout"):
        data.load_instructions()
    for kept in (0, 800):
        (tmp_path / "instructions.jsonl").write_bytes(b"".join(whole[:kept]))
        with pytest.raises(ValueError, match=f"must hold 900 examples, got {kept}; run `git"):
            data.load_instructions()


def test_hub_rows_become_prompts_and_split_by_the_same_rule(monkeypatch):
    import datasets

    rows = [
        {
            "instruction": f"Say {n}",
            "context": "Loud." if n % 2 else "",
            "response": f" {n} ",
            "category": "x",
        }
        for n in range(60)
    ] + [{"instruction": "Mute", "context": "", "response": " ", "category": "x"}]

    def load_dataset(name, split):
        assert (name, split) == ("databricks/databricks-dolly-15k", "train")
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parts = {split: data.load_instructions("dolly", split) for split in data.SPLITS}
    prompts = {split: part["prompt"] for split, part in parts.items()}
    assert len(prompts["train"]) + len(prompts["heldout"]) == 60
    assert {"Say 4", "Say 5\n\nLoud."} <= {*prompts["train"], *prompts["heldout"]}
    digests = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts["heldout"]]
    assert digests and all(int(digest, 16) % 10 == 0 for digest in digests)
    assert parts["train"].column_names == ["prompt", "answer"]


# Labels


def test_labels_decode_to_the_answer_and_its_end_token(tokenizer, splits):
    for row, source in zip(
        encode(splits["heldout"], tokenizer, 256), splits["heldout"], strict=True
    ):
        learned = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learned) == source["answer"] + tokenizer.eos_token
        assert row["input_ids"][-len(learned) :] == learned
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1


TEMPLATES = {  # the part of each model's template that decides where an answer begins and ends
    "Llama-3.2": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "Phi-4-mini": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
        "<|end|><|endoftext|>",
    ),
    "Qwen3": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n"
        "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt "
        "%}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("model", TEMPLATES)
def test_labels_under_other_chat_templates(model, splits):
    tokenizer = foreign_tokenizer(*TEMPLATES[model])
    source = splits["heldout"].select(range(3))
    for row, example in zip(encode(source, tokenizer, 2048), source, strict=True):
        learned = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learned) == example["answer"] + TEMPLATES[model][1]


def foreign_tokenizer(template, ends):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir())
    tokens = re.findall(r"<\|\w+\|>", ends)
    tokenizer.add_special_tokens({"eos_token": tokens[-1]})
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|im_start|>",
                *tokens,
            ]
        }
    )
    tokenizer.chat_template = template
    return tokenizer


def test_templates_that_cannot_be_masked_are_refused(splits):
    from transformers import AutoTokenizer

    one = splits["heldout"].select([0])
    tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir())
    for template, words in [
        (None, "must have a chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "special token"),
        (
            "{% if add_generation_prompt %}Go: {% endif %}{% for m in messages %}{{ m.content }}"
            "<|end|>{% endfor %}",
            "beginning of the whole conversation",
        ),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=words):
            encode(one, tokenizer, 256)


def test_truncation_never_leaves_a_row_without_an_answer(tokenizer, splits, capsys):
    rows = list(encode(splits["heldout"], tokenizer, 40))
    assert 0 < len(rows) < len(splits["heldout"])
    assert all(len(row["input_ids"]) <= 40 and max(row["labels"]) > -100 for row in rows)
    dropped = len(splits["heldout"]) - len(rows)
    assert f"dropped {dropped} of {len(splits['heldout'])} examples" in capsys.readouterr().out
    with pytest.raises(ValueError, match="sequence_length must leave room for an answer, got 5"):
        encode(splits["heldout"], tokenizer, 5)
    for bad in (1, 0, 2.5, True, None):
        with pytest.raises(ValueError, match="sequence_length must be a whole number"):
            encode(splits["heldout"], tokenizer, bad)


def test_collate_pads_what_is_neither_read_nor_learned():
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]},
        {"input_ids": [8], "attention_mask": [1], "labels": [8]},
    ]
    batch = collate(rows, pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


# The control and the check


def test_shuffled_answers_leave_nothing_in_its_place(splits):
    source = splits["heldout"]
    shuffled = shuffled_answers(source, seed=1)
    assert shuffled["prompt"] == source["prompt"]
    assert sorted(shuffled["answer"]) == sorted(source["answer"])
    assert not any(a == b for a, b in zip(shuffled["answer"], source["answer"], strict=True))
    assert list(shuffled_answers(source, seed=1)) == list(shuffled)
    assert list(shuffled_answers(source, seed=2)) != list(shuffled)
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        shuffled_answers(source.select([0]), seed=1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Dear Ada, we will trace the parcel.",
        TICKET.replace("Order: 4821\n", ""),
        TICKET.replace("4821", ""),
        TICKET + "\nNote: none",
        TICKET + "\n" + TICKET,
        TICKET.replace("Order: 4821\nProduct: desk lamp", "Product: desk lamp\nOrder: 4821"),
        TICKET.replace("Order", "order"),
    ],
)
def test_other_layouts_are_no_ticket(text):
    assert data.parse_answer(text) is None


def test_every_field_of_a_ticket_is_read():
    ticket = data.parse_answer(TICKET)
    assert ticket["Next step"] == "trace the parcel"
    assert data.parse_answer(TICKET + "\n") == ticket
    for right, wrong in [
        ("Ada", "Adam"),
        ("4821", "4812"),
        ("desk", "floor"),
        ("late", "faulty"),
        ("high", "low"),
        ("trace", "trace back"),
    ]:
        assert data.parse_answer(TICKET.replace(right, wrong)) != ticket


def test_import_is_light():
    code = (
        "import sys, fitcast.training.data; print({'torch', 'datasets', 'transformers'} & "
        "set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TOOLS.parent
    )
    assert out.stdout.strip() == "set()"


# Several turns, packing, and sets of one's own

TURNS = [
    {"role": "system", "content": "Keep it short."},
    {"role": "user", "content": "Where is order 7?"},
    {"role": "assistant", "content": "On its way."},
    {"role": "user", "content": "Since when?"},
    {"role": "assistant", "content": "Since Monday."},
]


def turns_learned(row, tokenizer):
    """What is labelled, each stretch by itself."""
    stretches = [[]]
    for label in row["labels"]:
        if label != -100:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.mark.parametrize("model", ["bundled", "Llama-3.2", "Phi-4-mini"])
def test_every_turn_of_the_assistant_is_learned_to_its_end(model, tokenizer):
    ends = ["<|end|>", "<|end|>"]
    if model != "bundled":
        tokenizer = foreign_tokenizer(*TEMPLATES[model])
        end = TEMPLATES[model][1]
        ends = [end.split("<|endoftext|>")[0], end]  # Phi ends the whole with one token more
    (row,) = encode([{"messages": TURNS}], tokenizer, 256)
    said = ["On its way.", "Since Monday."]
    assert turns_learned(row, tokenizer) == [a + b for a, b in zip(said, ends, strict=True)]
    (row,) = encode([{"messages": TURNS}], tokenizer, 256, last_answer_only=True)
    assert turns_learned(row, tokenizer) == [said[1] + ends[1]]


def test_a_template_that_rewrites_history_is_refused_with_a_way_on(tokenizer):
    """As Qwen3's: only the last answer is rendered with its (empty) thought."""
    changing = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last"
        " %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    tokenizer = foreign_tokenizer(changing, "<|im_end|>")
    with pytest.raises(ValueError, match="one_answer_each, and encode it with last_answer_only"):
        encode([{"messages": TURNS}], tokenizer, 256)
    each = one_answer_each(read([{"messages": TURNS}]))
    rows = encode(each, tokenizer, 256, last_answer_only=True)
    learned = [turns_learned(row, tokenizer) for row in rows]
    assert learned == [["On its way.<|im_end|>"], ["Since Monday.<|im_end|>"]]


def test_a_template_without_system_says_so():
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    tokenizer = foreign_tokenizer(strict, "<|im_end|>")
    with pytest.raises(ValueError, match=r"got system, .*no system.*into the first user message"):
        encode([{"messages": TURNS}], tokenizer, 256)


def test_cut_examples_are_counted(tokenizer, capsys):
    (row,) = encode([{"messages": TURNS}], tokenizer, 30)
    assert len(row["input_ids"]) == 30
    assert "cut 1 of 1 examples, longer than 30 tokens" in capsys.readouterr().out


def test_packed_rows_hold_every_example_once_and_no_mask(tokenizer, splits):
    rows = list(encode(splits["heldout"].select(range(40)), tokenizer, 256))
    packed = pack(rows, 256, tokenizer.pad_token_id)
    assert packed.column_names == ["input_ids", "labels"]
    assert {len(row["input_ids"]) for row in packed} == {256}
    examples = [row["input_ids"] for row in rows]
    whole = [token for row in packed for token in row["input_ids"]]
    assert len(whole) < 1.2 * sum(map(len, examples)), "hardly any padding"
    starts = whole.count(tokenizer.bos_token_id)
    assert starts == len(examples)
    texts = " ".join(map(str, whole))
    assert all(" ".join(map(str, example)) in texts for example in examples), "none was cut"
    learned = [label for row in packed for label in row["labels"] if label != -100]
    assert sorted(learned) == sorted(
        label for row in rows for label in row["labels"][1:] if label != -100
    )
    assert set(collate(list(packed.select(range(2))), 0)) == {"input_ids", "labels"}


@pytest.mark.parametrize(("count", "share"), [(60, 1 / 5), (600, 1 / 10)])
def test_a_set_of_ones_own_is_split_by_what_is_asked(count, share):
    rows = read([{"prompt": f"How much is {n}?", "completion": "x"} for n in range(count)] * 2)
    train, heldout = split_heldout(rows)
    asked = [{str(m[0]["content"]) for m in part["messages"]} for part in (train, heldout)]
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == count
    assert len(asked[1]) / count == pytest.approx(share, abs=0.08)


def test_a_set_too_small_to_be_judged_is_refused():
    same = read([{"prompt": "Hi", "completion": f"x{n}"} for n in range(50)])
    with pytest.raises(ValueError, match="leave at least 2 examples on each side .*different"):
        split_heldout(same)


def test_shuffled_conversations_keep_all_but_the_last_answer():
    rows = read([{"messages": [*TURNS[:4], {"role": "assistant", "content": t}]} for t in "abc"])
    shuffled = shuffled_answers(rows, seed=0)["messages"]
    assert [one[:4] for one in shuffled] == [TURNS[:4]] * 3
    answers = [one[4]["content"] for one in shuffled]
    assert sorted(answers) == list("abc") and all(map(str.__ne__, answers, "abc"))


def test_a_long_text_is_cut_without_the_tokenizers_alarm(splits, caplog):
    """That it would "result in indexing errors" is untrue: it is cut before a model sees it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir(), model_max_length=8)
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(caplog.handler)
    try:
        encode(splits["heldout"].select(range(2)), tokenizer, 64)
        assert not caplog.records
        tokenizer("2 + 2? " * 20)
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
