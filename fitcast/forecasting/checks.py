"""What the objects of a script have to be, before a library says so in words of its own."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from fitcast.gpus import PRESETS, Gpu
from fitcast.recipe import TrainRecipe
from fitcast.units import Said, refusal

LOOP = "write its step and use forecast_step"
# TRL's trainers whose rows are known here, and those built on them.
OF_TRL = ("SFTTrainer", "DPOTrainer", "GRPOTrainer", "RewardTrainer")


def check_card(gpu: Any) -> None:
    """A card is a `Gpu`, not its name.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(gpu, Gpu):
        name = gpu if gpu in PRESETS else "A100-40"
        raise refusal("gpu", "be a Gpu", gpu, f"write gpu=fitcast.preset({name!r})")


def check_recipe(recipe: Any) -> None:
    """A recipe is a `TrainRecipe`, not its model's name.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(recipe, TrainRecipe):
        raise refusal("recipe", "be a TrainRecipe", recipe, "write TrainRecipe(model=...)")


def check_trainer(trainer: Any) -> None:
    """A trainer is a class whose rows are known here.

    Raises:
        ValueError: It is no class, or one of TRL's that is fed otherwise.
    """
    if not isinstance(trainer, type):
        raise refusal("trainer", "be a class", trainer, "give a subclass of Trainer, as it is")
    of_trl = any(kind.__module__.startswith("trl.") for kind in trainer.__mro__)
    if of_trl and not any(kind.__name__ in OF_TRL for kind in trainer.__mro__):
        *most, last = OF_TRL
        raise refusal(
            "trainer", f"be transformers' Trainer or TRL's {', '.join(most)} or {last}",
            Said(trainer.__name__), LOOP,
        )  # fmt: skip


def check_objects(arguments: Any, peft_config: Any, options: dict[str, Any]) -> None:
    """Arguments and adapters that a library would stumble over in the middle of a run.

    Args:
        arguments: Of the run.
        peft_config: Of the adapters, or `None`.
        options: What else the trainer's class is given.

    Raises:
        ValueError: No row in a batch, adapters without a class, an optimizer of other weights.
    """
    rows = arguments.per_device_train_batch_size
    if rows < 1:
        raise refusal("per_device_train_batch_size", "be at least 1", rows, "for example 1")
    if peft_config is not None and not hasattr(peft_config, "peft_type"):
        remedy = "for example peft_config=LoraConfig(r=8)"
        raise refusal("peft_config", "be a config of PEFT", peft_config, remedy)
    optimizer = (options.get("optimizers") or (None,))[0]
    if optimizer is not None:
        kind = type(optimizer).__name__
        raise refusal(
            "optimizers", "be left to the trainer: this one holds weights of another model",
            Said(kind), f"give optimizer_cls_and_kwargs=({kind}, {{...}})",
        )  # fmt: skip


def length_of(given: Any, arguments: Any) -> int:
    """Tokens in a row: those given, else the arguments' `max_length`.

    Raises:
        ValueError: Nobody says it, or it is no whole number from 2 on.
    """
    length = getattr(arguments, "max_length", None) if given is None else given
    if type(length) is int and length >= 2:
        return length
    kind = type(arguments).__name__
    remedy = "for example sequence_length=512"
    if length is None:
        remedy = f"{kind} does not say how long a row is: give the longest of yours"
    raise refusal("sequence_length", "be a whole number of at least 2 tokens", length, remedy)


def target_of(model: Any) -> Any:
    """A row's label for a model with one label a row, as its loss wants it; else `None`.

    Source: transformers/loss/loss_utils.py, `ForSequenceClassificationLoss`.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None
    count, problem = model.config.num_labels, model.config.problem_type
    if problem == "multi_label_classification" or (problem == "regression" and count > 1):
        return [0.0] * count
    regression = problem == "regression" or (problem is None and count == 1)
    return 0.0 if regression else 0


def check_labels(model: Any, trainer: type, options: dict[str, Any]) -> None:
    """Whoever computes no loss from labels needs a trainer of its own.

    Args:
        model: On meta.
        trainer: Its class.
        options: What else the trainer's class is given.

    Raises:
        ValueError: transformers' own Trainer would find no loss.
    """
    import transformers

    stock = trainer is transformers.Trainer and options.get("compute_loss_func") is None
    theirs = type(model).__module__.startswith("transformers.")
    if stock and theirs and "labels" not in inspect.signature(model.forward).parameters:
        raise refusal(
            "model", "compute its loss from labels, one for a token or one for a row",
            Said(type(model).__name__), LOOP,
        )  # fmt: skip


def reward_model(config: Any) -> Any:
    """The class that RewardTrainer makes of a name: one score a row, for which `config` is set.

    Source: trl/trainer/reward_trainer.py (TRL 1.16).

    Raises:
        ValueError: transformers has none for this family.
    """
    from transformers import AutoModelForSequenceClassification

    known = AutoModelForSequenceClassification._model_mapping
    if type(config) not in known:
        raise refusal(
            "model", "have a class for sequence classification, which gives a text its reward",
            Said(config.model_type), "take a model of another family",
        )  # fmt: skip
    config.num_labels = 1
    return known[type(config)]


def attention_of(asked: str | None, config: Any) -> tuple[str | None, str | None]:
    """The attention that is run, and the FlashAttention that it stands for.

    FlashAttention has a package of its own, for CUDA; sdpa runs the same algorithm.

    Args:
        asked: As `attn_implementation`, or `None`.
        config: Of the model; may name one itself.

    Returns:
        A name of transformers or `None` for the model's own; what was asked for or `None`.

    Raises:
        ValueError: transformers knows no attention of that name.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    named = asked or getattr(config, "_attn_implementation", None)
    if isinstance(named, str) and "flash" in named:
        return "sdpa", named
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if asked is not None and asked not in known:
        close = difflib.get_close_matches(str(asked), known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "for example 'sdpa'"
        raise refusal("attn_implementation", "be one that transformers knows", asked, remedy)
    return asked, None
