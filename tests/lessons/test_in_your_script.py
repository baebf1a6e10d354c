"""In your script: what a learner takes home runs as it stands, with the small model for the large.

Each block is extracted into a file and run in an empty folder, on the versions that are installed.
On Colab's, `make test-colab` runs this file too.
"""

import ast
import functools
import os
import re
import runpy
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, import_utils
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

from course_utils.data import bundled_model_dir
from tools.minutes import code_lines
from tools.notebooks import lesson_scripts

LESSONS = ("01", "02", "03", "04", "05", "06", "07", "08")
OURS = {"06": {"fitcast"}}  # what a lesson takes home of this repository
BLOCK = re.compile(r"^# ## In your script\n(?:#.*\n)*?# ```python\n((?:#.*\n)*?)# ```$", re.M)
NO_TORCHAO = re.compile(r"`!pip uninstall (-\w+ )+torchao`")  # for Colab: PEFT refuses its old one
HUB = re.compile(r'"[\w-]+/[\w.-]+"')  # a model's name there
THEIRS = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes"}
MAX_LINES = 15  # imports aside
TRL = ("06", "07", "08")  # whose trainer refuses two cards in one process


def section(number: str) -> re.Match:
    """The words before a lesson's block, and the block."""
    (path,) = lesson_scripts([number])
    (found,) = BLOCK.finditer(path.read_text("utf-8"))
    return found


def script(number: str) -> str:
    """The block of a lesson, as a file would hold it."""
    block = section(number)[1]
    return "".join(f"{line[2:]}\n" for line in block.splitlines())


def imported(source: str) -> set[str]:
    """The packages that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def two_cards(monkeypatch) -> None:
    """Arguments that count two cards, as in a notebook on Kaggle, unless a script hid one."""
    arguments = TrainingArguments._setup_devices.func

    def seen(self):
        device = arguments(self)
        self._n_gpu = 1 if os.environ.get("CUDA_VISIBLE_DEVICES") == "0" else 2
        return device

    devices = functools.cached_property(seen)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)


@pytest.mark.parametrize("number", TRL)
def test_it_hides_the_second_card_before_torch_is_imported(number):
    """CUDA reads the variable once; under torchrun each process keeps its own card."""
    head, _, _ = script(number).partition("import torch\n")
    for launched, wanted in (({}, "0"), ({"LOCAL_RANK": "1"}, None)):
        if launched and number != "08":
            continue
        environ = dict(launched)
        exec(head.replace("os.environ", "environ"), {"environ": environ})
        assert environ.get("CUDA_VISIBLE_DEVICES") == wanted


@pytest.mark.parametrize("number", LESSONS)
def test_it_needs_nothing_of_this_repository(number):
    source = script(number)
    assert imported(source) <= THEIRS | OURS.get(number, set()) | set(sys.stdlib_module_names)
    lines = [line for line in code_lines(source) if not re.match(r"(import|from) ", line)]
    assert 5 <= len(lines) <= MAX_LINES
    assert HUB.search(source), "a model that a reader can replace"


@pytest.mark.parametrize(
    "number",
    [pytest.param(one, marks=() if one == "03" else pytest.mark.slow) for one in LESSONS],
)
def test_it_runs(number, tmp_path, monkeypatch, capsys):
    for package in imported(script(number)) & {"trl"}:  # not on Colab; the lesson says so
        pytest.importorskip(package)
    source = HUB.sub(repr(str(bundled_model_dir())), script(number))
    file = tmp_path / "mine.py"
    file.write_text(source, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # and back, whatever the block makes of it
    if number in TRL:
        two_cards(monkeypatch)
    import_utils.is_torchao_available.cache_clear()  # another script may have gone without
    if NO_TORCHAO.search(section(number)[0]):
        monkeypatch.setitem(sys.modules, "torchao", None)
    with warnings.catch_warnings(action="ignore"):  # names that version 6 will drop, to both sides
        made = runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out.strip(), "it says what it found"
    if "trainer" in made:  # fp16's scaler takes no other gradients, and TRL casts adapters
        weights = made["trainer"].model.parameters()
        assert {weight.dtype for weight in weights if weight.requires_grad} == {torch.float32}


def test_what_07_trained_is_merged_into_the_weights_it_was_trained_beside(tmp_path, monkeypatch):
    """In 4 bits with its adapter, and merged: the same logits. In the original weights: others."""
    (path,) = lesson_scripts(["07"])
    (merge,) = re.findall(
        r"((?:^#     .*\n)*#     model.save_pretrained\(.*\n)", path.read_text("utf-8"), re.M
    )
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load = functools.partial(
        AutoModelForCausalLM.from_pretrained, bundled_model_dir(), dtype=torch.float32
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    ids = torch.arange(1, 17).unsqueeze(0)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # PEFT's own, as above
        trained = get_peft_model(load(quantization_config=quantized), lora).eval()
        trained.save_pretrained(tmp_path / "adapter")
        expected = trained(input_ids=ids).logits
        monkeypatch.chdir(tmp_path)
        lines = "".join(f"{line[6:]}\n" for line in merge.splitlines())
        exec(lines, {"model": load(quantization_config=quantized)})
        merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(
            input_ids=ids
        ).logits
        other = PeftModel.from_pretrained(load(), "adapter")(input_ids=ids).logits
    apart, far = ((one - expected).abs().max() for one in (merged, other))
    assert apart < 1e-3 < 0.1 < far
