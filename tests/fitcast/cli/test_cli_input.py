"""What a stranger types: slips are forgiven or met by the right name, absurd numbers refused."""

import pytest

from course_utils.data import BUNDLED
from fitcast.cli import main as cli
from fitcast.cli import options

SMALL = ["--model", BUNDLED, "--sequence-length", "64"]


def refused(capsys, *words: str) -> str:
    """The one sentence with which a command is refused."""
    assert cli.main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (said,) = [line for line in told.err.splitlines() if not line.startswith("...")]
    return said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama-8b"], "model must be one of"),
        (["--gpu", "T5"], "gpu must be one of T4"),
        (["--gpu", "K80"], "for another card say --memory-gib and --capability"),
        (["--gpu", "A100"], "gpu must be one card, got 'A100'; say A100-40 or A100-80"),
        (["--memory-gib", "some"], "memory_gib must be a number, got 'some'"),
        (["--memory-gib", "inf"], "memory_gib must be a number, got 'inf'"),
        (["--memory-gib", "nan"], "memory_gib must be a number, got 'nan'"),
        (["--bf16", "maybe"], "--bf16 must be true or false, got 'maybe'"),
        (["--optim", "adafactor"], "Trainer's others are forecast in Python"),
        (["--memory-gib", "0.01"], "memory_gib must be from 0.15 to 1023"),
        (["--memory-gib", "24", "--capability", "86"], "capability must be two numbers such as"),
        (["--sequence-length", "-4"], "sequence_length must be a whole number"),
        (["--sequence-length", "2k"], "sequence_length must be a whole number from 2 to"),
        (["--sequence-length", "none"], "sequence_length must be a whole number"),
        (["--micro-batch-size", "0"], "micro_batch_size must be a whole number"),
        (["--micro-batch-size", "\u00b2"], "micro_batch_size must be a whole number"),
        (["--lora-dropout", "little"], "lora_dropout must be a number from 0 to 1"),
        (["--lora-dropout", "nan"], "lora_dropout must be a number from 0 to 1"),
        (["--amp-dtype", "bfloat16"], "amp_dtype must be 'float16' on a T4"),
        (["--lora-targets", "qkv"], "lora_targets must name linear layers"),
        (["--checkpointed-layers", "al"], "checkpointed_layers must be a whole number from 0 to "
         "1000 or 'all', got 'al'"),
        (["--lora-rank", "0"], "lora_rank must be a whole number from 1 to 4096 or None, got 0"),
        (["--lora-rank", "none"], "lora_rank must be a number when base is 'nf4'"),
    ],
)  # fmt: skip
def test_bad_input_exits_2_with_one_sentence(capsys, arguments, message):
    assert message in refused(capsys, "forecast", *SMALL, *arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["forcast"], "verb must be one of forecast, fit, levers, doctor, got 'forcast'; did you "
         "mean 'forecast'?"),
        (["lever", "--help"], "did you mean 'levers'?"),
        (["fit", "my.yaml"], "a file goes to `fitcast forecast my.yaml`; here give its"),
        (["levers", *SMALL, "my.yaml"], "a file goes to `fitcast forecast my.yaml`"),
        (["forecast", "my_sft.py"], "in Python: fitcast.forecast(model, arguments, gpu=...)"),
        (["predict"], "verb must be one of forecast, fit, levers, doctor, got 'predict'"),
        (["--json", "doctor"], "got '--json'; write the verb first"),
        (["--model", "llama-3.1-8b", "fit"], "got '--model'; write the verb first"),
        (["forecast", *SMALL, "--sequense-length", "64"], "did you mean --sequence-length?"),
        (["forecast", "--modle", "llama-3.1-8b"], "did you mean --model?"),
        (["forecast", *SMALL, "--micro", "4"], "did you mean --micro-batch-size?"),
        (["forecast", *SMALL, "--batch_size", "4"], "did you mean --micro-batch-size?"),
        (["forecast", *SMALL, "--packing"], "rows without padding are --no-padded"),
        (["forecast", *SMALL, "-json"], "did you mean --json?"),
        (["forecast", *SMALL, "--offload-checkpoint=yes"], "mean --offload-checkpoints?"),
        (["forecast", *SMALL, "--target-effective-batch", "8"], "`fitcast forecast` has"),
        (["forecast", "llama-3.1-8b"], "write --model llama-3.1-8b"),
        (["forecast", *SMALL, "T4"], "an option begins with --"),
        (["doctor", "--jsn"], "did you mean --json?"),
        (["forecast", *SMALL, "--loss", "chunkd"], "loss must be one of full, chunked, lean, "
         "fused, compiled, got 'chunkd'; did you mean 'chunked'?"),
        (["forecast", *SMALL, "--optimizer", "adam"], "did you mean 'adamw'?"),
        (["forecast", *SMALL, "--amp-dtype", "bf16"], "did you mean 'bfloat16'?"),
        (["forecast", *SMALL, "--gpu", "A100"], "say A100-40 or A100-80"),
        (["forecast", "--model", "lama-3.1-8b"], "did you mean 'llama-3.1-8b'?"),
        (["forecast"], "--model must say what is trained: llama-3.2-1b, "),
        (["levers", "--model"], "-path: expected one argument; see `fitcast levers --help`"),
        (["forecast", *SMALL, "--padded=yes"], "see `fitcast forecast --help`"),
        (["fit", *SMALL, "--utilisation", "most"], "utilisation must be a number, got 'most'"),
        (["fit", *SMALL, "--utilisation", "7"], "utilisation must be above 0"),
        (["fit", *SMALL, "--pinned-host", "much"], "pinned_host must be a number, got 'much'"),
        (["fit", *SMALL, "--pinned-host", "-1"], "pinned_host must be from 0 to 1023, got '-1'; "
         "it is in GiB"),
        (["fit", *SMALL, "--target-effective-batch", "100003"], "target_effective_batch must be a"),
        (["fit", *SMALL, "--target-effective-batch", "8.5"], "must be a whole number, got '8.5'"),
    ],
)  # fmt: skip
def test_a_slip_is_met_by_the_right_name(capsys, words, message):
    said = refused(capsys, *words)
    assert said.startswith("error: ") and message in said


def test_nothing_is_suggested_where_nothing_is_alike(capsys):
    assert "did you mean" not in refused(capsys, "doctor", "--model", "llama-3.1-8b")


def test_a_folder_without_a_config_is_named(capsys, tmp_path):
    said = refused(capsys, "forecast", "--model", str(tmp_path))
    assert f"{tmp_path}/config.json" in said and "save_pretrained" in said


def test_a_folder_that_may_not_be_read_is_named(capsys, monkeypatch):
    def denied(asked, progress):
        raise PermissionError(13, "Permission denied", "/root/model/config.json")

    monkeypatch.setitem(cli.COMMANDS, "forecast", denied)
    assert "/root/model/config.json" in refused(capsys, "forecast", *SMALL)


def test_a_hub_id_without_network_is_refused_by_name(capsys):
    said = refused(capsys, "forecast", "--model", "meta-llama/Llama-3.2-1B")
    assert "model must be reachable on the hub, got 'meta-llama/Llama-3.2-1B'" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--images", "1"), "images must be 0 for llama, got 1; it has no vision tower"),
        (("--images", "-1"), "images must be a whole number from 0, got -1"),
        (("--images", "one"), "images must be a whole number, got 'one'"),
        (
            ("--images", "1", "--step", "merge"),
            "--images must be given for a training step on one card, got 1",
        ),
        (("--images", "1", "--strategy", "ddp"), "leave out --step and --strategy"),
    ],
)
def test_images_where_nobody_looks_at_them_are_refused(capsys, words, said):
    assert said in refused(capsys, "forecast", *SMALL, *words)


def test_images_go_beside_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: m")
    asked = options.parse(["forecast", str(file), "--images", "2"])
    assert options.beside_file(asked) == {"images": 2}


def test_targets_may_be_written_with_spaces():
    asked = options.parse(["forecast", *SMALL, "--lora-targets", "q_proj, v_proj"])
    assert options.recipe_of(asked).lora_targets == ("q_proj", "v_proj")


def test_names_of_trainer_trl_and_peft_are_understood():
    theirs = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps=8"]
    theirs += ["--max_length", "128", "--lora_r", "8", "--target_modules", "all-linear"]
    recipe = options.recipe_of(options.parse(["forecast", "--model", BUNDLED, *theirs]))
    assert (recipe.micro_batch_size, recipe.gradient_accumulation_steps) == (4, 8)
    assert (recipe.sequence_length, recipe.lora_rank) == (128, 8)
    assert recipe.lora_targets == "all-linear"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--bf16", "--gpu", "A100-40"], ["--amp-dtype", "bfloat16"]),
        (["--fp16", "True"], ["--amp-dtype", "float16"]),
        (["--fp16", "false"], []),
        (["--gradient_checkpointing"], ["--checkpointed-layers", "all"]),
        (["--gradient_checkpointing=False"], ["--checkpointed-layers", "0"]),
        (["--load_in_4bit"], ["--base", "nf4"]),
        (["--optim", "adamw_torch"], ["--optimizer", "adamw"]),
        (["--optimizer", "adamw_bnb_8bit"], ["--optimizer", "adamw_8bit"]),
        (["--optim", "paged_adamw_8bit"], ["--optimizer", "paged_adamw_8bit"]),
        (["--lora_target_modules", "q_proj"], ["--lora-targets", "q_proj"]),
    ],
)
def test_switches_and_optimizers_of_trainer_say_the_same(theirs, ours):
    recipes = [
        options.recipe_of(options.parse(["forecast", "--model_name_or_path", BUNDLED, *words]))
        for words in (theirs, ours)
    ]
    assert recipes[0] == recipes[1]


def test_letter_case_of_choices_does_not_matter():
    asked = options.parse(["Forecast", *SMALL, "--gpu", "h200", "--loss", "Chunked"])
    assert options.gpu_of(asked).name == "H200"
    assert options.recipe_of(asked).loss == "chunked"
