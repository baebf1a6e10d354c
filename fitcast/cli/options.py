"""What can be asked on the command line: the verbs, their options, and what a slip meant.

The options are the fields of `TrainRecipe`, explained by its docstring. argparse splits the line
and writes the help; values are read here and judged by `TrainRecipe`, so that the command line and
Python refuse in the same words.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import re
import shlex
import typing
from collections.abc import Iterable, Sequence

import fitcast
from fitcast import gpus, models
from fitcast.recipe import CHOICES, TRAINER_OPTIM, TrainRecipe
from fitcast.units import GIB, Said, refusal

DESCRIPTION = """\
What an LLM fine-tune needs of a GPU, to the byte, from a machine without one.

    fitcast forecast --model llama-3.1-8b --gpu T4 --sequence-length 2048
    fitcast forecast run.yaml --gpu A100-40
    fitcast fit --model llama-3.1-8b --target-effective-batch 32
    fitcast levers --model llama-3.1-8b --micro-batch-size 4
    fitcast doctor
"""
EXIT_CODES = """\
exit code: 0 it fits (doctor: nothing to mend), 4 it is tight, 3 it does not fit, 2 the question
makes no sense
"""
VERBS = {
    "forecast": "what one training step needs, and whether it fits",
    "fit": "the fastest settings that fit; it chooses micro batch and accumulation, checkpointed "
    "layers, attention, loss, and what is kept where",
    "levers": "every single change of a recipe: what it saves, what it costs",
    "doctor": "what this machine is, and what would break on it",
}
USAGE = {
    "forecast": " (--model NAME | FILE)",
    "fit": " --model NAME",
    "levers": " --model NAME",
    "doctor": "",
}
FILE = """\
FILE is a .yaml, .yml or .json that axolotl, LLaMA-Factory or TRL's command line trains from; beside
it go --gpu, --json, --images, and, in place of what it says, --model, --sequence-length, --padded.
"""
BESIDE_FILE = ("model", "sequence_length", "padded")
GROUPS = {
    "model (what is trained, in which precision)": (
        "model",
        "base",
        "double_quant",
        "kbit_upcast",
        "amp_dtype",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "lora_targets",
    ),
    "batch (what it is trained on)": (
        "micro_batch_size",
        "gradient_accumulation_steps",
        "world_size",
        "sequence_length",
        "padded",
    ),
    "levers (how memory is saved)": (
        "checkpointed_layers",
        "offload_checkpoints",
        "keep_attention",
        "attention",
        "causal_padding",
        "loss",
        "loss_chunk_tokens",
        "norm",
        "mlp",
        "mlp_tile_tokens",
        "embedding",
        "adapters",
        "rotary",
        "optimizer",
        "flat_optimizer",
        "expandable_segments",
    ),
}
# Fields of a recipe that change no byte: nobody is asked for them here.
NOT_ASKED = (
    "max_steps",
    "logging_steps",
    "save_steps",
    "seed",
    "warmup_fraction",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
)
# Names by which Trainer, TRL and PEFT know the same thing.
ALSO = {
    "model": ("model-name-or-path",),
    "micro_batch_size": ("per-device-train-batch-size",),
    "sequence_length": ("max-length",),
    "lora_rank": ("lora-r",),
    "lora_targets": ("target-modules", "lora-target-modules"),
    "optimizer": ("optim",),
}
# Switches of theirs: the field that says the same, and its value when they are on and off.
SWITCHES = {
    "bf16": ("amp_dtype", "bfloat16", None),
    "fp16": ("amp_dtype", "float16", None),
    "gradient-checkpointing": ("checkpointed_layers", "all", "0"),
    "load-in-4bit": ("base", "nf4", None),
}
# Trainer's names of optimizers that have another here.
OPTIM = {theirs: ours for ours, theirs in TRAINER_OPTIM.items()} | {"adamw_bnb_8bit": "adamw_8bit"}
# What its letters do not tell.
MEANT = {
    "--batch-size": "did you mean --micro-batch-size?",
    "--packing": "rows without padding are --no-padded; SFTConfig's packing, with the mask between "
    "its texts, is forecast in Python or from TRL's file",
}
# Where the docstring speaks to readers of Python, or not at all.
MODELS = f"{', '.join(models.NAMES)}, a folder with a config.json, or a hub id"
IN_OTHER_WORDS = {
    "lora_targets": "Names of the linear layers with adapters, with commas between, or all-linear.",
    "amp_dtype": "Autocast's dtype; none computes in the dtype of the weights.",
    "loss_chunk_tokens": "Rows of logits at a time, of all losses but the full one.",
    "causal_padding": "Whether training forgets the mask of padded batches, all padding behind.",
    "mlp_tile_tokens": "Tokens that an MLP computes at a time; none computes all at once.",
    "embedding": "host keeps a frozen one's weights in host memory and sends rows.",
    "mlp": "lean keeps one tensor less, compiled as little in one kernel of torch.compile.",
    "adapters": "stock as PEFT adds them, lean in one product, in_place into the base's output.",
    "rotary": "Position embedding; lean has half the memory traffic, compiled one kernel.",
    "flat_optimizer": "Whether it steps all adapters as one parameter.",
    "optimizer": "Who updates; 8-bit state, paged to the host when the GPU is full.",
}
DEFAULTS = {"model": "required", "amp_dtype": "default: as suits the GPU"}
HINTS = typing.get_type_hints(TrainRecipe)


class _Parser(argparse.ArgumentParser):
    """Refuses by raising: `main` prints one sentence, not a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


class _Switch(argparse.Action):
    """One of `SWITCHES`, alone or, as Hugging Face's own parser takes it, with true or false."""

    def __call__(self, parser, namespace, values, option_string=None):
        field, on, off = SWITCHES[(option_string or "").removeprefix("--")]
        wanted = str(values).lower()
        if wanted not in ("true", "false"):
            raise refusal(option_string or field, "be true or false", values, "leave it alone")
        value = on if wanted == "true" else off
        if value is not None:
            setattr(namespace, field, value)


def parser() -> argparse.ArgumentParser:
    """All verbs; every field of `TrainRecipe` that decides memory is an option."""
    return _parsers()[0]


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the whole line and those of the verbs."""
    top = _Parser(
        prog="fitcast",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"fitcast {fitcast.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="VERB")
    verbs = {}
    for name, about in VERBS.items():
        asks = name != "doctor"
        verbs[name] = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            usage=f"fitcast {name}{USAGE[name]} [option ...]",
            epilog=(FILE if name == "forecast" else "") + EXIT_CODES,
            allow_abbrev=False,
        )
        if asks:
            _add_recipe(verbs[name])
            _add_card(verbs[name], name)
        if name == "forecast":
            from fitcast.cli import ranks, steps

            steps.add_options(verbs[name])
            ranks.add_options(verbs[name])
        output = verbs[name].add_argument_group("output")
        output.add_argument("--json", action="store_true", help="For programs; bytes are integers.")
    return top, verbs


def _add_recipe(verb: argparse.ArgumentParser) -> None:
    about = _field_docs() | IN_OTHER_WORDS | {"model": f"One of {MODELS}."}
    for title, fields in GROUPS.items():
        group = verb.add_argument_group(title)
        for field in fields:
            names = [f"--{name}" for name in _names(field)]
            text = f"{about.get(field, '')} ({DEFAULTS.get(field) or _default(field)})"
            options: dict[str, typing.Any] = {"default": argparse.SUPPRESS, "help": text}
            if field in ("offload_checkpoints", "keep_attention"):
                options |= {"nargs": "?", "const": True, "metavar": "N"}
                group.add_argument(
                    f"--no-{names[0][2:]}",
                    dest=field,
                    action="store_false",
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )
            elif HINTS[field] is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["metavar"] = _placeholder(field)
            group.add_argument(*names, **options)
        _add_switches(group, fields)
        if "micro_batch_size" in fields and verb.prog.endswith(" fit"):
            group.add_argument(
                "--target-effective-batch",
                metavar="N",
                help="Sequences behind one optimizer step. (default: those of the recipe)",
            )
        if "micro_batch_size" in fields and verb.prog.endswith(" forecast"):
            group.add_argument(
                "--images",
                metavar="N",
                help="Pictures in each row, for a model with a vision tower; their tokens are "
                "among the row's. (default: 0)",
            )


def _add_switches(group: typing.Any, fields: Iterable[str]) -> None:
    for name, (field, *_) in SWITCHES.items():
        if field in fields:
            group.add_argument(
                f"--{name}",
                action=_Switch,
                nargs="?",
                const="true",
                default=argparse.SUPPRESS,
                dest=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


def _add_card(verb: argparse.ArgumentParser, name: str) -> None:
    card = verb.add_argument_group("card (where it will run)")
    card.add_argument(
        "--gpu",
        default="T4",
        metavar="NAME",
        help=f"One of {', '.join(gpus.PRESETS)}. (default: T4)",
    )
    card.add_argument(
        "--memory-gib",
        metavar="X",
        help="Memory of another card, as it shows it. (default: that of --gpu)",
    )
    card.add_argument(
        "--capability",
        metavar="X.Y",
        help="Compute capability of another card, such as 8.6. (default: that of --gpu)",
    )
    if name == "fit":
        card.add_argument(
            "--utilisation",
            metavar="X",
            help="Part of the GPU's peaks that is reached, for times only. (default: what it "
            "sustains, a range)",
        )
        host = verb.add_argument_group("host (the machine around it)")
        host.add_argument(
            "--pinned-host",
            metavar="GIB",
            help="Most of its memory that checkpoints may lock. (default: 10, of Colab's 12.7)",
        )
        host.add_argument(
            "--compiled",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="Whether torch.compile may be used, which needs a C compiler there.",
        )


def _names(field: str) -> list[str]:
    return [field.replace("_", "-"), *ALSO.get(field, ())]


def _field_docs() -> dict[str, str]:
    """What each field of `TrainRecipe` is, in the words of its docstring."""
    text = (inspect.getdoc(TrainRecipe) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {
        field: " ".join(words.split()).replace("`", "").replace("None", "none").replace("%", "%%")
        for field, words in entries
    }


def _default(field: str) -> str:
    default = getattr(TrainRecipe, field)
    if isinstance(default, bool):
        default = "yes" if default else "no"
    return f"default: {as_text(default)}"


def _placeholder(field: str) -> str:
    if field in CHOICES:
        return f"{{{','.join(map(as_text, CHOICES[field]))}}}"
    if HINTS[field] is float:
        return "X"
    return {"model": "NAME", "lora_targets": "NAMES"}.get(field, "N")


def as_text(value: object) -> str:
    """A field's value as it is written behind its option.

    Example:
        >>> as_text(None), as_text(("q_proj", "v_proj")), as_text(2048), as_text(0.0)
        ('none', 'q_proj,v_proj', '2048', '0')
    """
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value).removesuffix(".0")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options that were typed; the values of a recipe's fields are still text.

    Raises:
        ValueError: No such verb or option, or no model; the message names the nearest right one.
        SystemExit: `--help` or `--version` was asked for, and printed.
    """
    words = [_with_dashes(word) for word in words]
    top, verbs = _parsers()
    if words and words[0] not in top._option_string_actions:
        early = words[0].startswith("-")
        words[0] = one_of("verb", words[0], VERBS, "write the verb first" if early else "")
    options, unknown = top.parse_known_args(words)
    options.file = _file_among(unknown) if options.command == "forecast" else None
    if unknown:
        raise _no_such_option(options, unknown, verbs[options.command])
    if _lacks_model(options):
        raise refusal(
            "--model",
            f"say what is trained: {MODELS}",
            Said("none"),
            f"for example fitcast {options.command} --model {models.NAMES[0]}",
        )
    return options


def _lacks_model(options: argparse.Namespace) -> bool:
    return options.command != "doctor" and not (hasattr(options, "model") or options.file)


def _file_among(words: list[str]) -> str | None:
    """The first word that names a file to forecast, taken out of the others."""
    from fitcast.forecasting.files import names_one

    found = next((word for word in words if not word.startswith("-") and names_one(word)), None)
    if found is not None:
        words.remove(found)
    return found


def beside_file(options: argparse.Namespace) -> dict[str, typing.Any]:
    """What was typed beside a file, as `forecast_run` calls it.

    Raises:
        ValueError: An option that the file itself has to say.
    """
    fields = [field for group in GROUPS.values() for field in group if hasattr(options, field)]
    for field in fields:
        if field not in BESIDE_FILE:
            raise refusal(
                f"--{field.replace('_', '-')}",
                f"not be given beside {options.file}",
                getattr(options, field),
                "change the file, which says it",
            )
    given = {field: getattr(options, field) for field in fields}
    if images := images_of(options):
        given["images"] = images
    if "sequence_length" in given:
        given["sequence_length"] = number("sequence_length", given["sequence_length"], int, "2048")
    return given


def images_of(options: argparse.Namespace) -> int:
    """How many pictures each row holds; whether the model takes them is seen with the model.

    Raises:
        ValueError: No whole number, or another step or several cards were asked for.
    """
    if options.images is None:
        return 0
    images = number("images", options.images, int, "1")
    if images and (options.step.lower() != "train" or options.strategy is not None):
        remedy = "leave out --step and --strategy"
        raise refusal("--images", "be given for a training step on one card", images, remedy)
    return images


def _with_dashes(word: str) -> str:
    """`--max_length`, as Trainer and TRL write it, is `--max-length`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _no_such_option(
    options: argparse.Namespace, unknown: list[str], verb: argparse.ArgumentParser
) -> ValueError:
    word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    close = nearest(word, verb._option_string_actions, alike=0.7)  # all share their dashes
    remedy = f"did you mean {close}?" if close else f"see `{verb.prog} --help`"
    remedy = MEANT.get(word, remedy)
    if not word.startswith("-"):
        lacks = _lacks_model(options)
        remedy = f"write --model {word}" if lacks else "an option begins with --"
        remedy = _where_it_goes(word) or remedy
    return refusal("option", f"be one that `{verb.prog}` has", word, remedy)


def _where_it_goes(word: str) -> str | None:
    """Advice for a file typed where no file is read; `None` for another word."""
    from fitcast.forecasting.files import names_one

    if word.endswith(".py"):
        return "a script's run is forecast in Python: fitcast.forecast(model, arguments, gpu=...)"
    if names_one(word):
        return f"a file goes to `fitcast forecast {word}`; here give its settings as options"
    return None


def nearest(word: str, names: Iterable[str], alike: float = 0.6) -> str | None:
    """The name that was probably meant: one that begins so, or else one spelt much alike.

    Args:
        alike: From which share of equal letters on, from 0 to 1.

    Example:
        >>> nearest("forcast", VERBS), nearest("A100", gpus.PRESETS), nearest("tea", VERBS)
        ('forecast', 'A100-40', None)
    """
    by_lower = {name.lower(): name for name in names}
    begin = [name for name in by_lower if name.startswith(word.lower())]
    close = begin or difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=alike)
    return by_lower[close[0]] if close else None


def one_of(field: str, got: str, names: Iterable[str], remedy: str = "") -> str:
    """The one of `names` that was typed, in any letter case.

    Raises:
        ValueError: None of them; the nearest one is named, beside what `remedy` says.
    """
    names = list(names)
    for name in names:
        if name.lower() == got.lower():
            return name
    close = nearest(got, names)
    remedies = [remedy, f"did you mean {close!r}?" if close else ""]
    said = "; ".join(filter(None, remedies)) or "pick one of these"
    raise refusal(field, f"be one of {', '.join(names)}", got, said)


def gpu_of(options: argparse.Namespace) -> gpus.Gpu:
    """The card that was asked for, by name or by memory and compute capability.

    Raises:
        ValueError: No preset has this name, or no card can be like that.
    """
    if not gpus.presets_called(options.gpu):
        other = "for another card say --memory-gib and --capability"
        one_of("gpu", options.gpu, gpus.PRESETS, other)
    gpu = gpus.preset(options.gpu)
    if options.memory_gib is None and options.capability is None:
        return gpu
    total, capability = gpu.total_bytes, gpu.capability
    if options.memory_gib is not None:
        total = int(number("memory_gib", options.memory_gib, float, "23.6") * GIB)
        if not gpu.context_bytes < total < 1024 * GIB:
            raise refusal(
                "memory_gib",
                "be from 0.15 to 1023",
                options.memory_gib,
                "the MiB of nvidia-smi, over 1024",
            )
    if options.capability is not None:
        found = re.fullmatch(r"(\d{1,2})\.(\d)", options.capability)
        if not found:
            where = "see developer.nvidia.com/cuda-gpus"
            raise refusal("capability", "be two numbers such as 8.6", options.capability, where)
        capability = (int(found[1]), int(found[2]))
    return gpus.custom(total, capability)


def pinned_host_of(options: argparse.Namespace) -> int:
    """Bytes of the host's memory that may be locked, as they were asked for.

    Raises:
        ValueError: They are no number of GiB from 0 to 1023.
    """
    from fitcast.forecasting.search import PINNED_HOST_BYTES

    if options.pinned_host is None:
        return PINNED_HOST_BYTES
    wanted = number("pinned_host", options.pinned_host, float, "10")
    if not 0 <= wanted < 1024:
        remedy = "it is in GiB; 0 leaves checkpoints on the GPU"
        raise refusal("pinned_host", "be from 0 to 1023", options.pinned_host, remedy)
    return int(wanted * GIB)


def _card_words(gpu: gpus.Gpu) -> list[str]:
    """The options that `gpu_of` reads as this card."""
    if gpu == gpus.T4:
        return []
    if gpus.PRESETS.get(gpu.name) == gpu:
        return ["--gpu", gpu.name]
    memory, (major, minor) = gpu.total_bytes / GIB, gpu.capability
    return ["--memory-gib", f"{memory:.6g}", "--capability", f"{major}.{minor}"]


def recipe_of(options: argparse.Namespace) -> TrainRecipe:
    """The recipe that was asked for; mixed precision as it suits the GPU unless it was named.

    Raises:
        ValueError: A value that its field cannot have.
    """
    given = {
        field: _value(field, getattr(options, field))
        for fields in GROUPS.values()
        for field in fields
        if hasattr(options, field)
    }
    recipe = TrainRecipe(**given)
    return recipe if "amp_dtype" in given else recipe.for_gpu(gpu_of(options))


def _value(field: str, typed: str | bool) -> typing.Any:
    """What was typed, as its field wants it; what cannot be read stays text, and is refused."""
    if isinstance(typed, bool) or field == "model":
        return typed
    if field == "lora_targets":
        names = tuple(name.strip() for name in typed.split(","))
        return typed if typed == "all-linear" else names
    if field == "optimizer":
        typed = OPTIM.get(typed.lower(), typed)
    if field in CHOICES:
        others = "Trainer's others are forecast in Python" if field == "optimizer" else ""
        typed = one_of(field, typed, map(as_text, CHOICES[field]), others)
    if typed.lower() == "none":
        return None
    try:
        return float(typed) if HINTS[field] is float else int(typed)
    except ValueError:
        return typed


def number(option: str, typed: str, kind: type[int] | type[float], example: str) -> typing.Any:
    """The number behind an option that is no field of a recipe.

    Raises:
        ValueError: It is none; `example` shows one.
    """
    try:
        value = kind(typed)
        if not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        rule = "be a whole number" if kind is int else "be a number"
        raise refusal(option, rule, typed, f"for example {example}") from None


def as_options(recipe: TrainRecipe, before: TrainRecipe) -> list[str]:
    """The words that turn the one recipe's command line into the other's.

    Example:
        >>> before = TrainRecipe(model="llama-3.1-8b")
        >>> after = TrainRecipe(model="llama-3.1-8b", loss="chunked", double_quant=False)
        >>> as_options(after, before)
        ['--no-double-quant', '--loss', 'chunked']
    """
    words = []
    for fields in GROUPS.values():
        for field in fields:
            value = getattr(recipe, field)
            if value == getattr(before, field):
                continue
            name = field.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{name}")
            else:
                words += [f"--{name}", as_text(value)]
    return words


def command_line(verb: str, recipe: TrainRecipe, gpu: gpus.Gpu) -> str:
    """The command that asks `verb` about this recipe, ready for a shell."""
    plain = TrainRecipe(model=recipe.model).for_gpu(gpu)
    card = _card_words(gpu)
    words = ["fitcast", verb, "--model", recipe.model, *card, *as_options(recipe, plain)]
    return shlex.join(words)
