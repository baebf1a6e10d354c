"""Answers on the command line: does it fit, what would fit, is this machine ready.

    fitcast forecast --model llama-3.1-8b --gpu T4 --sequence-length 2048
    fitcast fit --model llama-3.1-8b --target-effective-batch 32
    fitcast doctor

Exit code: 0 it fits (or nothing to mend), 3 it does not, 2 the question makes no sense.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import threading
import time
import typing

from fitcast import gpus, models
from fitcast.recipe import CHOICES, TrainRecipe
from fitcast.units import show_bytes

FITS, BAD_INPUT, DOES_NOT_FIT = 0, 2, 3
PATIENCE_SECONDS = 1.0  # before progress is shown
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


class Progress:
    """Says on stderr what is going on, when it goes on for over a second."""

    def __init__(self):
        self.start, self.text = time.monotonic(), "forecasting"
        self._timer = threading.Timer(PATIENCE_SECONDS, self._show)
        self._timer.daemon = True
        self._timer.start()

    def __call__(self, text: str) -> None:
        self.text = text
        if time.monotonic() - self.start > PATIENCE_SECONDS:
            self._show()

    def _show(self) -> None:
        print(f"... {self.text}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        self._timer.cancel()


def parser() -> argparse.ArgumentParser:
    """All commands; every field of `TrainRecipe` that decides memory is an option."""
    top = argparse.ArgumentParser(
        prog="fitcast", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("forecast", "what one training step needs"),
        ("fit", "the fastest settings that fit, and what each change saves"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--gpu", default="T4", help=f"one of {', '.join(gpus.PRESETS)}")
        command.add_argument("--json", action="store_true", help="for programs")
        _add_recipe(command)
        if name == "fit":
            command.add_argument("--target-effective-batch", type=int)
            command.add_argument(
                "--utilisation",
                type=float,
                default=0.6,
                help="part of the GPU's peak that is reached, for times only",
            )
    doctor = commands.add_parser("doctor", help="what is this machine, what would break on it")
    doctor.add_argument("--json", action="store_true", help="for programs")
    return top


def _add_recipe(command: argparse.ArgumentParser) -> None:
    hints = typing.get_type_hints(TrainRecipe)
    for field in dataclasses.fields(TrainRecipe):
        options: dict = {"default": argparse.SUPPRESS}
        if field.name in NOT_ASKED:
            continue
        if field.name == "model":
            options |= {
                "help": f"{', '.join(models.NAMES)}, a folder or a hub id",
                "default": "llama-3.2-1b",
            }
        elif field.name == "lora_targets":
            options |= {"type": _targets, "help": "all-linear, or names with commas"}
        elif hints[field.name] is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        elif hints[field.name] in (int, float):
            options |= {"type": hints[field.name]}
        else:  # a word, a number or none
            options |= {"type": _word, "choices": CHOICES.get(field.name)}
        command.add_argument("--" + field.name.replace("_", "-"), **options)


def _word(text: str) -> str | int | None:
    if text.lower() == "none":
        return None
    return int(text) if text.lstrip("-").isdigit() else text


def _targets(text: str) -> str | tuple[str, ...]:
    return text if text == "all-linear" else tuple(name.strip() for name in text.split(","))


def recipe_of(options: argparse.Namespace) -> TrainRecipe:
    """The recipe that was asked for; mixed precision as it suits the GPU unless it was named."""
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(TrainRecipe)
        if hasattr(options, field.name)
    }
    recipe = TrainRecipe(**given)
    return recipe if "amp_dtype" in given else recipe.for_gpu(gpus.preset(options.gpu))


def forecast_command(options: argparse.Namespace, progress: Progress) -> int:
    gpu, recipe = gpus.preset(options.gpu), recipe_of(options)
    from fitcast.forecasting.forecast import forecast

    f = forecast(recipe, gpu)
    if options.json:
        print(json.dumps(_as_json(recipe, f), indent=1))
    else:
        print(f)
        for name, n_bytes in (
            *f.composition.items(),
            *((f"peak in {phase}", n_bytes) for phase, n_bytes in f.phase_peaks.items()),
        ):
            print(f"  {name:18}{show_bytes(n_bytes):>12}")
    return FITS if f.fits else DOES_NOT_FIT


def _as_json(recipe: TrainRecipe, f) -> dict:
    names = (
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "device_bytes",
        "margin_bytes",
        "fits",
        "composition",
        "phase_peaks",
        "peak_phase",
        "peak_operation",
        "peak_module",
        "loaded_bytes",
        "resident_bytes",
        "saved_activation_bytes",
        "flops",
        "ideal_seconds",
    )
    return {"recipe": dataclasses.asdict(recipe), "gpu": f.gpu.name} | {
        name: getattr(f, name) for name in names
    }


def fit_command(options: argparse.Namespace, progress: Progress) -> int:
    gpu, recipe = gpus.preset(options.gpu), recipe_of(options)
    from fitcast.forecasting.search import fit, levers

    best = fit(
        recipe,
        gpu,
        options.target_effective_batch,
        utilisation=options.utilisation,
        progress=progress,
    )
    single = levers(best.recipe, gpu, progress)
    if options.json:
        print(
            json.dumps(
                _as_json(best.recipe, best.forecast)
                | {
                    "tokens_per_second": best.tokens_per_second,
                    "utilisation": best.utilisation,
                    "levers": [
                        {
                            "change": lever.change,
                            "saved_bytes": lever.saved_bytes,
                            "speedup": lever.speedup,
                        }
                        for lever in single
                    ],
                },
                indent=1,
            )
        )
        return FITS
    r = best.recipe
    print(best.forecast)
    print(
        f"  micro batch {r.micro_batch_size} x {r.gradient_accumulation_steps} accumulated x "
        f"{r.world_size} GPUs, {r.checkpointed_layers} layers checkpointed, {r.loss} loss, "
        f"{r.attention} attention{', checkpoints on the host' * r.offload_checkpoints}"
    )
    print(
        f"  about {best.tokens_per_second:.0f} tokens/s a GPU at {best.utilisation:.0%} of its "
        "peak\nfrom there, one change at a time:"
    )
    for lever in single:
        print(f"  {lever}")
    return FITS


def doctor_command(options: argparse.Namespace, progress: Progress) -> int:
    from fitcast.cli.doctor import doctor

    findings = doctor()
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(
                f"{'mend' if finding.fix else 'ok':5}{finding.name:14}{finding.found}"
                + f"\n{'':19}-> {finding.fix}" * bool(finding.fix)
            )
    return DOES_NOT_FIT if any(finding.fix for finding in findings) else FITS


COMMANDS = {"forecast": forecast_command, "fit": fit_command, "doctor": doctor_command}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parser().parse_args(arguments)
    progress = Progress()
    try:
        code = COMMANDS[options.command](options, progress)
        sys.stdout.flush()
        return code
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return DOES_NOT_FIT if isinstance(error, MemoryError) else BAD_INPUT
    except BrokenPipeError:  # `| head -1` has read enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FITS
    finally:
        progress.stop()


if __name__ == "__main__":
    sys.exit(main())
