"""The bundled model: whole, small, 4-bit friendly, and made by the committed script."""

import hashlib
import importlib
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest

from course_utils import data

TOOLS = Path(__file__).resolve().parents[3] / "tools"


@pytest.fixture(scope="module")
def pretrain():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("train_bundled_model")
    sys.path.remove(str(TOOLS))


@pytest.fixture
def copied(tmp_path, monkeypatch):
    shutil.copytree(data.DATA, tmp_path / "data")
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    return tmp_path / "data" / "model"


def test_size_and_manifest():
    files = [path for path in data.DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    manifest = json.loads((data.DATA / "manifest.json").read_text())
    found = {
        path.relative_to(data.DATA).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.parent.name == "model"
    }
    assert manifest == found
    assert data.bundled_model_dir() == data.DATA / "model"


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), ValueError, "must have sha256"),
        (lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]), ValueError, "is damaged"),
        (lambda path: path.unlink(), FileNotFoundError, "is missing"),
    ],
)
def test_damaged_or_missing_file_is_named(copied, damage, error, words):
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        whole = (copied / name).read_bytes()
        damage(copied / name)
        with pytest.raises(error, match=rf"{name}.*{words}.*git checkout -- course_utils/data"):
            data.bundled_model_dir()
        (copied / name).write_bytes(whole)
    (copied.parent / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json must be JSON.*git checkout"):
        data.bundled_model_dir()
    (copied.parent / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing"):
        data.bundled_model_dir()


def test_shape_of_the_model():
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(data.bundled_model_dir())
    config = model.config
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    linear = [p for name, p in model.model.layers.named_parameters() if p.dim() == 2]
    assert all(size % 64 == 0 for p in linear for size in p.shape)  # whole NF4 blocks
    with safe_open(data.bundled_model_dir() / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_tokenizer_loads_fast_with_distinct_special_tokens():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir())
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.is_fast and len(set(ids)) == 3 and None not in ids
    assert tokenizer("Hi").input_ids[0] == tokenizer.bos_token_id
    text = "Żółw & 12345 \N{SNOWMAN}\n\tok"  # bytes outside the training text survive
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_pretraining_never_shows_a_ticket_or_an_instruction(pretrain):
    prompts = {
        row["prompt"] for split in data.SPLITS for row in data.load_instructions(split=split)
    }
    text = list(itertools.islice(pretrain.documents(7), 3000))
    assert not prompts & {turns[0] for turns in text}
    joined = "\n".join(turn for turns in text for turn in turns)
    for field in data.FIELDS:
        assert f"{field}:" not in joined


@pytest.mark.slow
def test_two_short_pretrainings_write_the_same_bytes(pretrain, tmp_path, capsys):
    import torch

    threads = torch.get_num_threads()
    try:
        for name in ("one", "two"):
            pretrain.main(["--out", str(tmp_path / name), "--steps", "2"])
    finally:
        torch.set_num_threads(threads)
    assert "loss" in capsys.readouterr().out
    one, two = ((tmp_path / name / "manifest.json").read_text() for name in ("one", "two"))
    assert one == two
    committed = data.DATA / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "one/model" / name).read_bytes() == (committed / name).read_bytes()
