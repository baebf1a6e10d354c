"""Files of axolotl, LLaMA-Factory and TRL become the objects that each tool makes of them.

What is expected of a file was worked out from the tools' own sources, which the readers name. The
files marked "unseen" came after the readers were written.
"""

import json

import pytest

import fitcast
from course_utils.data import BUNDLED
from fitcast.cli import main as cli
from fitcast.forecasting import files
from fitcast.gpus import T4, preset

A100 = preset("A100-40")

AXOLOTL_QLORA = """
base_model: NousResearch/Meta-Llama-3-8B
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
val_set_size: 0
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: paged_adamw_32bit
learning_rate: 2e-4
bf16: auto
fp16:
gradient_checkpointing: true
flash_attention: true
deepspeed:
special_tokens:
  pad_token: "<|end_of_text|>"
"""
AXOLOTL_LORA_8BIT = """
base_model: unsloth/Meta-Llama-3.1-8B-Instruct
load_in_8bit: true
adapter: lora
sequence_len: 2048
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
lora_modules_to_save:
  - embed_tokens
  - lm_head
peft_use_dora: true
lora_mlp_kernel: true
lora_qkv_kernel: true
micro_batch_size: 1
optimizer: adopt_adamw
fp16: true
bf16: false
gradient_checkpointing: offload
sdp_attention: true
"""
AXOLOTL_UNSEEN = """
base_model: NousResearch/Meta-Llama-3.1-8B
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_fused_linear_cross_entropy: true
liger_rope: false
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
optimizer: adamw_torch_fused
bf16: auto
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: true
attention: flash
fsdp:
  - full_shard
fsdp_config:
  fsdp_offload_params: true
"""
FACTORY_QLORA = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 1024
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
warmup_ratio: 0.1
fp16: true
val_size: 0.1
per_device_eval_batch_size: 1
use_unsloth: true
"""
FACTORY_FULL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: pt
finetuning_type: full
dataset: c4_demo
cutoff_len: 4096
per_device_train_batch_size: 4
bf16: true
optim: adafactor
disable_gradient_checkpointing: true
flash_attn: fa2
neftune_noise_alpha: 5
"""
FACTORY_UNSEEN = """
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
quantization_bit: 4  # choices: 8, 4
quantization_method: bnb
trust_remote_code: true
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
template: qwen3_nothink
dataloader_num_workers: 4
plot_loss: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
bf16: true
ddp_timeout: 180000000
attn: some-kernel
"""
TRL_QLORA = """
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
per_device_train_batch_size: 2
fp16: true
dtype: float16
load_in_4bit: true
use_bnb_nested_quant: true
use_peft: true
lora_r: 32
lora_target_modules: all-linear
max_length: 2048
packing: true
use_liger_kernel: true
"""
TRL_DPO = """
model_name_or_path: Qwen/Qwen3-1.7B
per_device_train_batch_size: 1
bf16: true
max_length: 512
beta: 0.2
precompute_ref_log_probs: true
"""
TRL_UNSEEN = """
env:
  CUDA_VISIBLE_DEVICES: 0
model_name_or_path:
  Qwen/Qwen2.5-0.5B
dataset_name:
  stanfordnlp/imdb
report_to:
  none
learning_rate:
  0.0001
"""


def written(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text, "utf-8")
    return str(path)


def subset(script, **fields):
    """Fields of a script as far as they are asked for; of a dictionary the keys asked for."""
    for name, wanted in fields.items():
        found = getattr(script, name)
        if isinstance(wanted, dict):
            found = {key: found[key] for key in wanted}
        assert found == wanted, name


def test_axolotl_says_qlora_in_its_own_words(tmp_path):
    path = written(tmp_path, AXOLOTL_QLORA)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    subset(
        files.read(path, A100),
        tool="axolotl",
        model="NousResearch/Meta-Llama-3-8B",
        lora={"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"},
        quantization={"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"} | nf4,
        arguments=batch | {"bf16": True, "fp16": False, "optim": "paged_adamw_32bit"},
        dtype="bfloat16",
        sequence_length=4096,
        padded=False,
        notes=["flash_attention is forecast as PyTorch's own kernel, sdpa"],
    )
    on_t4 = files.read(path, T4)  # no bfloat16, no FlashAttention: packed texts get a mask
    subset(on_t4, arguments={"bf16": False, "fp16": True}, dtype="float16", padded=True)
    assert "a T4 has no FlashAttention: write sdp_attention: true instead" in on_t4.notes
    assert any(note.startswith("sample_packing keeps") for note in on_t4.notes)


def test_axolotl_patches_are_named(tmp_path):
    script = files.read(written(tmp_path, AXOLOTL_LORA_8BIT), T4)
    saved = ["embed_tokens", "lm_head"]
    subset(
        script,
        model="llama-3.1-8b",  # a preset's place on the hub: no network needed
        quantization={"load_in_8bit": True},
        lora={"target_modules": ["q_proj", "v_proj"], "modules_to_save": saved, "use_dora": True},
        dtype="float16",
        attention="sdpa",
    )
    assert "optim" not in script.arguments
    named = {note.split(":")[0] for note in script.notes}
    assert named == {"optimizer", "gradient_checkpointing", "lora_mlp_kernel", "lora_qkv_kernel"}


def test_axolotl_unseen(tmp_path):
    script = files.read(written(tmp_path, AXOLOTL_UNSEEN), A100)
    subset(script, lora=None, quantization=None, dtype="bfloat16", padded=False, attention="sdpa",
           arguments={"gradient_checkpointing_kwargs": {"use_reentrant": True}})  # fmt: skip
    named = {note.split(":")[0] for note in script.notes[1:]}
    assert named == {"plugins", "liger_fused_linear_cross_entropy", "fsdp", "fsdp_config"}


def test_llama_factory_says_qlora_in_its_own_words(tmp_path):
    subset(
        script := files.read(written(tmp_path, FACTORY_QLORA), T4),
        tool="LLaMA-Factory",
        lora={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        quantization={"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16"},
        arguments={
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "fp16": True,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        dtype="float16",
        sequence_length=1024,
        padded=None,
    )
    (note,) = script.notes
    assert note.startswith("use_unsloth: true is not modelled: it replaces the model's own code")
    assert script.training_arguments(T4).per_device_train_batch_size == 1


def test_llama_factory_trains_all_weights_in_float32(tmp_path):
    """It casts what trains to float32 unless pure_bf16 is set; pre-training packs."""
    script = files.read(written(tmp_path, FACTORY_FULL), A100)
    subset(script, lora=None, dtype="float32", padded=False, attention="sdpa", sequence_length=4096)
    assert "gradient_checkpointing" not in script.arguments
    arguments = script.training_arguments(A100)
    assert (arguments.optim, arguments.neftune_noise_alpha, arguments.bf16) == (
        "adafactor",
        5,
        True,
    )
    pure = files.read(written(tmp_path, FACTORY_FULL + "pure_bf16: true\n"), A100)
    assert pure.dtype == "bfloat16"


def test_llama_factory_unseen(tmp_path):
    script = files.read(written(tmp_path, FACTORY_UNSEEN), A100)
    subset(script, lora={"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
           dtype="bfloat16", sequence_length=2048,
           notes=["attn: some-kernel is not understood, and is left out"])  # fmt: skip


def test_trl_command_line(tmp_path):
    pytest.importorskip("trl")
    script = files.read(written(tmp_path, TRL_QLORA), T4)
    subset(
        script,
        tool="TRL",
        model="qwen3-0.6b",
        config_class="SFTConfig",
        lora={"r": 32, "lora_alpha": 32, "target_modules": "all-linear"},
        quantization={"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16"},
        dtype="float16",
    )
    assert [note.split(":")[0] for note in script.notes] == ["use_liger_kernel"]
    made = script.training_arguments(T4)
    assert (made.max_length, made.packing, made.fp16, made.bf16) == (2048, True, True, False)
    assert made.use_liger_kernel is False
    dpo = files.read(written(tmp_path, TRL_DPO), A100)
    assert dpo.config_class == "DPOConfig" and dpo.dtype == "float32"
    assert dpo.training_arguments(A100).precompute_ref_log_probs is True


def test_trl_unseen(tmp_path):
    pytest.importorskip("trl")
    path = written(tmp_path, TRL_UNSEEN)
    note = "env: {'CUDA_VISIBLE_DEVICES': 0} is not understood, and is left out"
    subset(files.read(path, A100), model="Qwen/Qwen2.5-0.5B", dtype="float32", notes=[note])
    with pytest.raises(ValueError, match="^bf16 must be false on a T4.*; write fp16: true"):
        files.read(path, T4)  # TRL's default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AXOLOTL_QLORA + "micro_batchsize: 4", "key must be spelled .* micro_batchsize: 4; did you "
         "mean micro_batch_size"),
        (AXOLOTL_QLORA.replace("sequence_len: 4096", "sequence_len: long"),
         "sequence_len must be a whole number from 1, got 'long'; for example sequence_len: 8"),
        (AXOLOTL_QLORA.replace("lora_r: 32", "lora_r: [32]"), r"lora_r must be .*, got \[32\]; "),
        (AXOLOTL_QLORA.replace("lora_r: 32", "lora_r: 3.5"), "lora_r must be a whole number"),
        (AXOLOTL_QLORA.replace("adapter: qlora", "adapter: ia3"), "adapter must be one of none,"),
        (AXOLOTL_QLORA.replace("load_in_4bit: true", "load_in_4bit: 4"),
         "load_in_4bit must be true or false, got 4; "),
        (AXOLOTL_QLORA.replace("bf16: auto", "bf16: true"), "bf16 must be false on a T4"),
        (AXOLOTL_QLORA + "rl: grpo", "rl must be one of none, dpo, got 'grpo'; "),
        (FACTORY_QLORA.replace("lora_target: q_proj,v_proj", "lora_target: {a: 1}"),
         "lora_target must be names, or text with commas between, got {'a': 1}; "),
        (FACTORY_QLORA.replace("quantization_bit: 4", "quantization_bit: 3"),
         "quantization_bit must be 4 or 8, got 3; "),
        (FACTORY_QLORA.replace("stage: sft", "stage: ppo"), "stage must be one of sft, pt, dpo"),
        (FACTORY_QLORA + "gradient_accumulation_step: 2", "mean gradient_accumulation_steps"),
        (FACTORY_QLORA + "max_grad_norm: none", "max_grad_norm must be a number, got 'none'"),
        (FACTORY_QLORA + "optim: adamx", "LLaMA-Factory's file must .* adamx"),
        ("compute_environment: LOCAL_MACHINE", "name its model, as base_model"),
        ("- a\n- b", "must have keys and values"),
        ("a: [1", "run.yaml must be YAML or JSON, got while parsing .* line 1, column"),
        ("", "must have keys and values, .*got NoneType"),
        ("1: 2", "must have keys and values"),
    ],
)  # fmt: skip
def test_a_slip_is_one_sentence(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as refused:
        files.read(written(tmp_path, text), T4).training_arguments(T4)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match="^file must be there and readable, got nowhere.yaml"):
        files.read("nowhere.yaml", T4)


def test_text_that_yaml_takes_for_another_kind(tmp_path):
    """1e-4 is text in YAML, an empty value is None, and JSON is read as well."""
    run = {"model_name_or_path": "m", "stage": "sft", "fp16": "true", "lora_rank": "16",
           "lora_dropout": "1e-1", "additional_target": None}  # fmt: skip
    script = files.read(written(tmp_path, json.dumps(run), "run.json"), T4)
    subset(script, lora={"r": 16, "lora_dropout": 0.1}, arguments={"fp16": True}, notes=[])
    assert "modules_to_save" not in script.lora


SMALL = f"""
model_name_or_path: {BUNDLED}
stage: sft
finetuning_type: lora
lora_target: all
cutoff_len: 64
per_device_train_batch_size: 2
fp16: true
use_reentrant_gc: false
frobnicate: 3
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks
def test_a_file_is_forecast_as_the_objects_that_it_says(tmp_path, capsys):
    from peft import LoraConfig

    path = written(tmp_path, SMALL)
    found = fitcast.forecast(path, T4)
    arguments = files.read(path, T4).training_arguments(T4)
    same = fitcast.forecast(
        BUNDLED, arguments, peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        dtype="float16", sequence_length=64, gpu=T4,
    )  # fmt: skip
    note = "frobnicate: 3 is not understood, and is left out"
    assert str(found) == str(same) and found.composition == same.composition
    assert found.notes == (note, *same.notes)
    assert cli.main(["forecast", path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == path and told["notes"] == list(found.notes)
    assert told["peak_allocated_bytes"] == found.peak_allocated_bytes


def test_beside_a_file_go_few_options(tmp_path, capsys):
    path = written(tmp_path, SMALL)
    assert cli.main(["forecast", path, "--lora-rank", "8"]) == 2
    assert "--lora-rank must not be given beside" in capsys.readouterr().err
    assert cli.main(["forecast", path, "--sequence-length", "long"]) == 2
    assert "sequence_length must be a whole number, got 'long'" in capsys.readouterr().err
    assert cli.main(["forecast", "run.toml"]) == 2
    assert "write --model run.toml" in capsys.readouterr().err
