"""A stock Trainer and SFTTrainer with the levers on their model: the same losses, fewer bytes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import fitcast
from fitcast.step.apply import apply_levers
from tests.tiny import ROWS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT 0.21
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
]
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
STEPS = 20


def tiny(kind="llama", **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more))


def adapted(model, **more):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **more))


def padded(rows):
    """A batch as long as its longest row, the others filled up behind a mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        for name, fill in filled.items()
    }


def settings(folder, kind=TrainingArguments, **more):
    common = dict(
        output_dir=folder, use_cpu=True, max_steps=STEPS, logging_steps=1, learning_rate=1e-2,
        per_device_train_batch_size=4, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    return kind(**common | more)


def words():
    """A tokenizer, which SFTTrainer asks for; the rows are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=known, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def losses(trainer, levers):
    if levers is not None:
        apply_levers(trainer.model, **levers)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer(folder, model, **more):
    return Trainer(
        model=model, args=settings(folder, **more), train_dataset=ROWS, data_collator=padded
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peft", "accumulated", "levers"),
    [
        (True, 2, {}),
        pytest.param(False, 1, {}, marks=pytest.mark.slow),
        pytest.param(False, 3, {"loss": "chunked"}, marks=pytest.mark.slow),
        pytest.param(True, 1, {"checkpointed_layers": 1, "keep_attention": True},
                     marks=pytest.mark.slow),
        pytest.param(True, 1, {"checkpointed_layers": "all", "offload_checkpoints": True},
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_stock_trainer_loses_the_same(tmp_path, peft, accumulated, levers):
    """20 steps over padded rows of 8 to 23 tokens; the losses move by a tenth, and equally."""
    more = {"gradient_accumulation_steps": accumulated}
    if "checkpointed_layers" in levers:
        more["activation_checkpointing"] = True
    runs = [
        losses(trainer(tmp_path, adapted(tiny()) if peft else tiny(), **more), chosen)
        for chosen in (None, levers)
    ]
    assert len(runs[0]) == STEPS and runs[0][0] - runs[0][-1] > 0.05
    assert runs[1] == pytest.approx(runs[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_stock_sft_trainer_loses_the_same(tmp_path, packing):
    trl = pytest.importorskip("trl")
    runs = []
    for levers in (None, {}):
        arguments = settings(
            tmp_path, trl.SFTConfig, bf16=False, max_length=64, packing=packing,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        runs.append(
            losses(
                trl.SFTTrainer(
                    model=tiny(), args=arguments, train_dataset=ROWS, processing_class=words(),
                    peft_config=LoraConfig(r=4, target_modules="all-linear"),
                ),
                levers,
            )
        )  # fmt: skip
    assert len(runs[0]) == STEPS
    assert runs[1] == pytest.approx(runs[0], abs=1e-4)


def test_what_was_changed_and_what_was_left_is_said():
    found = apply_levers(tiny(), mlp="stock")
    assert list(found.applied) == ["attention", "norm", "rotary", "loss"]
    assert found.left["mlp"] == "as asked"
    assert "a model without LoRA on a linear layer" in found.left["adapters"]
    assert "norm: native" in str(found).splitlines()
    assert apply_levers(adapted(tiny())).applied["adapters"] == "lean"


REFUSED = {
    "DoRA": (lambda: adapted(tiny(), use_dora=True), {"adapters": "lean"}, "Dora"),
    "lora_bias": (lambda: adapted(tiny(attention_bias=True, mlp_bias=True), lora_bias=True),
                  {"adapters": "lean"}, "lora_bias"),
    "soft cap of the logits": (lambda: tiny("gemma2", head_dim=16), {"loss": "lean"},
                               "final_logit_softcapping"),
    "soft cap of the scores": (lambda: tiny("gemma2", head_dim=16), {"attention": "explicit_kv"},
                               "Gemma2ForCausalLM"),
    "sinks": (lambda: tiny("gpt_oss", head_dim=16, num_local_experts=2, num_experts_per_tok=1),
              {"attention": "explicit_kv"}, "GptOssForCausalLM"),
    "Gemma's norm": (lambda: tiny("gemma2", head_dim=16), {"norm": "native"}, "Gemma2RMSNorm"),
    "no language model": (lambda: torch.nn.Linear(2, 2), {}, "model must be a causal language"),
    "no such value": (tiny, {"loss": "small"}, "lean, fused, compiled, got 'small'"),
    "no such attention": (tiny, {"attention": "flash"}, "got 'flash'"),
    "nothing to change": (tiny, {"adapters": "lean"}, "nothing would change"),
    "a router's loss": (lambda: tiny("mixtral", output_router_logits=True, num_local_experts=2),
                        {"loss": "chunked"}, "a router's loss"),
    "kept without checkpoints": (tiny, {"keep_attention": True}, "checkpointed_layers"),
}  # fmt: skip


def test_a_loss_that_trl_takes_itself_is_said_to_be_trls():
    """SFTTrainer asks its own forward for the loss, in chunks: ours never runs there."""
    from trl.trainer.utils import add_fused_lm_head

    model = tiny()
    add_fused_lm_head(model)
    model = adapted(model)
    for _ in range(2):  # applied again, too
        assert apply_levers(model).applied["loss"].startswith("TRL's own where its trainer")
    assert apply_levers(tiny()).applied["loss"].startswith("lean")


@pytest.mark.parametrize(
    ("kind", "more", "left"),
    [
        ("llama4_text", {"intermediate_size_mlp": 64, "num_local_experts": 2}, "mlp"),
        ("inkling_text", {"moe_intermediate_size": 32, "n_routed_experts": 2, "d_rel": 4,
                          "num_experts_per_tok": 1}, "attention"),
    ],
)  # fmt: skip
def test_what_was_applied_holds_in_the_first_step(kind, more, left):
    """Llama 4 names no trunk by its prefix; Inkling's positions are a bias that no kernel takes."""
    model, ids = tiny(kind, head_dim=16, **more).train(), torch.arange(1, 12)[None]
    stock = model(input_ids=ids, labels=ids).loss
    assert left in apply_levers(model).left
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, stock)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_combined_is_refused_by_name(what):
    make, levers, named = REFUSED[what]
    model = make()
    with pytest.raises(ValueError, match="must") as refused:
        apply_levers(model, **levers)
    assert named in str(refused.value)
    if what in ("DoRA", "soft cap of the logits", "sinks"):  # unnamed, it is left and said
        assert next(iter(levers)) in apply_levers(model).left


def test_a_lean_loss_that_was_named_wants_a_frozen_head():
    model = tiny().train()
    apply_levers(model, loss="lean")
    ids = torch.arange(1, 12)[None]
    with pytest.raises(ValueError, match="for a head that is trained, got 'lean'"):
        model(input_ids=ids, labels=ids)


def test_the_head_s_logits_are_there_outside_of_training():
    """Evaluation, generation, a reader's own loss: the model's own forward."""
    model, ids = tiny(), torch.arange(1, 12)[None]
    stock = copy.deepcopy(model)
    apply_levers(model, attention="stock", norm="stock", mlp="stock", rotary="stock")
    apply_levers(model, attention="stock", norm="stock", mlp="stock", rotary="stock")  # twice: once
    assert model.train()(input_ids=ids, labels=ids).logits is None
    assert model(input_ids=ids).logits is not None
    lean, usual = (m.eval()(input_ids=ids, labels=ids) for m in (model, stock))
    torch.testing.assert_close(lean.logits, usual.logits)
    twin = copy.deepcopy(model).train()  # as a reference model is made
    assert twin(input_ids=ids, labels=ids).loss.item() == pytest.approx(usual.loss.item(), abs=1e-5)
    assert twin.forward.__self__ is twin and twin._stock_forward.__self__ is twin


@pytest.mark.slow
def test_a_script_is_forecast_with_its_levers(tmp_path):
    from course_utils.data import BUNDLED

    arguments = settings(tmp_path, fp16=True)
    options = dict(
        peft_config=LoraConfig(r=4, target_modules="all-linear"), dtype="float16",
        sequence_length=128, gpu=fitcast.T4,
    )  # fmt: skip
    stock, lean, full = (
        fitcast.forecast(BUNDLED, arguments, levers=levers, **copy.deepcopy(options))
        for levers in (None, True, {"loss": "full"})
    )
    logits = 4 * 128 * 1280 * 4  # rows x tokens x vocabulary in float32
    assert stock.peak_bytes > full.peak_bytes > lean.peak_bytes + logits
    with pytest.raises(ValueError, match="^checkpointed_layers must be 'all' or 0 in the forecast"):
        fitcast.forecast(BUNDLED, arguments, levers={"checkpointed_layers": 1}, **options)
    with pytest.raises(ValueError, match="^levers must be True or keywords"):
        fitcast.forecast(BUNDLED, arguments, levers="lean", **options)


def test_a_trainer_that_switches_checkpointing_on_gets_this_one():
    """`Trainer.train` does so for `gradient_checkpointing=True`, on the PEFT model around it."""
    model = adapted(tiny())
    apply_levers(model, checkpointed_layers=1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    layers = model.get_base_model().model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
