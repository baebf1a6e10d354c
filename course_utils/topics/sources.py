"""Where a run's model and data come from: this package, the hub, or chance. Decided once.

Without a GPU: the bundled model and data, and the hub is not even asked. With one: a model and real
instructions from the hub; when it does not answer, random weights at the model's real shape with
the bundled data, and `Source` says so.

A learner's own model (a hub id or a folder) and own data (a file, a hub set, a list of dicts) take
the same way.

Not modelled: private repositories, other hubs, a download that breaks off half-way.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_utils import data as bundled
from fitcast import models
from fitcast.gpus import Gpu
from fitcast.training import conversations, random_weights
from fitcast.training.data import labelled, split_heldout
from fitcast.training.preflight import ask_hub
from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from datasets import Dataset

AUTO, BUNDLED_NAME = "auto", "bundled"
MODELS = ("llama-3.2-1b", "qwen3-1.7b", "phi-4-mini")  # the first is the default
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HELDOUT_EXAMPLES = 64  # enough for an interval
LONGEST = 1024  # tokens of a row, if the data have longer ones
# Optimizer steps for data of one's own: three epochs, of few examples up to ten, but no more than
# FEW_STEPS for those.
EPOCHS, MOST_EPOCHS, FEW_STEPS = 3, 10, 30
SETTINGS = {  # what a recipe needs to know about its model, beyond the name
    BUNDLED_NAME: {
        "lora_targets": "all-linear",
        "sequence_length": 104,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "checkpointed_layers": 0,
        "learning_rate": 7e-3,
        "max_grad_norm": 0.3,
        "max_steps": 64,
    },
    "phi-4-mini": {"lora_targets": ("qkv_proj", "o_proj")},  # its projections are fused
}
DEFAULTS = {
    "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "sequence_length": 1024,
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "checkpointed_layers": "all",
    "learning_rate": 2e-4,
    "max_steps": 60,
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model and its data, found.

    Attributes:
        model: For `TrainRecipe.model`: a name, or the folder of random weights.
        weights: "bundled", "hub" or "random".
        data: "bundled" or "dolly", for `course_utils.data.load_instructions`; "own" for `own`.
        settings: Fields of a recipe that suit this model.
        tokenizer_from: Folder or hub id of the tokenizer.
        said: What was decided and why, in a sentence.
        own: Conversations that the learner brought.
    """

    model: str
    weights: str
    data: str
    settings: dict[str, Any]
    tokenizer_from: str
    said: str
    own: Dataset | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.said

    def tokenizer(self) -> Any:
        """The tokenizer that goes with model and data."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.tokenizer_from)
        if tokenizer.pad_token_id is None:  # padding is neither read nor learned: any token does
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def conversations(self) -> tuple[Dataset, Dataset]:
        """Conversations to train on and conversations held out, column `messages`."""
        if self.own is not None:
            train, heldout = split_heldout(self.own)
        else:
            train, heldout = (
                conversations.read(bundled.load_instructions(self.data, split))
                for split in bundled.SPLITS
            )
        return train, heldout.select(range(min(HELDOUT_EXAMPLES, len(heldout))))


def settings_of(model: str) -> dict[str, Any]:
    """Fields of a recipe that suit a model, by its name; of one unknown, every linear layer."""
    known = {} if model in models.NAMES else {"lora_targets": "all-linear"}
    return DEFAULTS | known | SETTINGS.get(model, {})


def choose(
    gpu: Gpu | None, model: str | Path = AUTO, data: Any = AUTO, folder: str | Path = "."
) -> Source:
    """The source of a run on this machine.

    Args:
        gpu: What `gpus.detect()` found.
        model: A name in `models.NAMES`, a causal model's id on the hub, a folder with one,
            "bundled", or "auto": the bundled one without a GPU, else the first of `MODELS`.
        data: As for `conversations.read`; "auto" is what goes with the model.
        folder: Where random weights are written, if they must be.

    Raises:
        ValueError: No such model; a large one without a GPU; a gated or misspelt one; data that
            cannot be learned from.
        FileNotFoundError: No such file of data.
    """
    source = _with_model(gpu, str(model), folder)
    return source if isinstance(data, str) and data == AUTO else _with_data(source, data)


def _with_data(source: Source, data: Any) -> Source:
    """The source with data of one's own, and a length and steps that suit them."""
    own = conversations.read(data)
    tokenizer = source.tokenizer()
    longest = max(len(labelled(one, tokenizer)[0]) for one in own["messages"])
    length = min(8 * math.ceil(longest / 8), LONGEST)
    behind_a_step = math.prod(
        source.settings[name] for name in ("micro_batch_size", "gradient_accumulation_steps")
    )
    epoch = len(split_heldout(own)[0]) / behind_a_step
    steps = math.ceil(max(EPOCHS * epoch, min(FEW_STEPS, MOST_EPOCHS * epoch)))
    settings = {"sequence_length": length, "max_steps": steps}
    said = (
        f"{source.said} Data of your own: {len(own)} conversations, the longest of {longest} "
        f"tokens; rows of {length}, {steps} steps."
    )
    return replace(source, data="own", own=own, settings=source.settings | settings, said=said)


def _with_model(gpu: Gpu | None, model: str, folder: str | Path) -> Source:
    if model == AUTO:
        model = BUNDLED_NAME if gpu is None else MODELS[0]
    if model == BUNDLED_NAME:
        folder = str(bundled.bundled_model_dir())
        return Source(
            model=folder,
            weights="bundled",
            data="bundled",
            settings=SETTINGS[model],
            tokenizer_from=folder,
            said="Model and data of the course: no download, runs anywhere.",
        )
    if Path(model).exists():
        folder = str(Path(model).resolve())  # the lesson goes on in a folder of its own
        return Source(
            model=folder,
            weights="folder",
            data="bundled",
            settings=settings_of(model),
            tokenizer_from=folder,
            said=f"The model in {model}; data: bundled.",
        )
    models.hub_id(model)  # raises with the nearest name
    if gpu is None:
        raise refusal(
            "model",
            "be 'bundled', 'auto' or a folder without a GPU",
            model,
            "switch Runtime > Change runtime type to T4",
        )
    settings, repository = settings_of(model), models.hub_id(model)
    answer = ask_hub(repository)
    if answer in ("gated", "unknown"):
        raise refusal(
            "model",
            "be open to you on the hub",
            Said(f"{repository}, which is {answer}"),
            f"pick another of {', '.join(MODELS)}, or log in",
        )
    if answer == "silent":
        return Source(
            model=str(_with_tokenizer(random_weights.write(model, folder).resolve())),
            weights="random",
            data="bundled",
            settings=settings,
            tokenizer_from=str(bundled.bundled_model_dir()),
            said=f"The hub does not answer: random weights in the shape of {model}, and the "
            "bundled data. Memory and speed hold, words and losses do not.",
        )
    data = "dolly" if ask_hub(bundled.DOLLY, "dataset") == "open" else "bundled"
    return Source(
        model=model,
        weights="hub",
        data=data,
        settings=settings,
        tokenizer_from=repository,
        said=f"{repository} from the hub; data: {data}.",
    )


def _with_tokenizer(folder: Path) -> Path:
    """The folder with the bundled tokenizer in it: `pipeline` asks an adapter's base for one."""
    source = bundled.bundled_model_dir()  # checks every file
    for name in TOKENIZER_FILES:
        if not (folder / name).exists():
            part = folder / f"{name}.{os.getpid()}.part"
            shutil.copyfile(source / name, part)
            part.replace(folder / name)  # ranks write side by side, and see whole files only
    return folder
