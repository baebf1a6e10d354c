"""Answers on the command line: does it fit, what would, what does each change do, what is here.

    fitcast forecast --model llama-3.1-8b --gpu T4 --sequence-length 2048
    fitcast forecast run.yaml --gpu A100-40
    fitcast forecast --model llama-3.1-8b --step generation --new-tokens 256
    fitcast forecast --model llama-3.1-8b --world-size 2 --strategy fsdp2
    fitcast fit --model llama-3.1-8b --target-effective-batch 32
    fitcast levers --model llama-3.1-8b --micro-batch-size 4
    fitcast doctor

Exit code: 0 it fits (or nothing to mend), 4 it is tight, 3 it does not fit, 2 the question makes no
sense. The answer goes to stdout, everything else to stderr. torch is imported by the verb that
needs it, not before.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fitcast.cli import options, ranks, show, start, steps
from fitcast.cli.progress import Progress

if TYPE_CHECKING:
    from fitcast.forecasting.verdict import Forecast
    from fitcast.gpus import Gpu
    from fitcast.recipe import TrainRecipe

FITS, BAD_INPUT, DOES_NOT_FIT, TIGHT = 0, 2, 3, 4
INTERRUPTED = 130  # as a shell says it of a program that Ctrl-C ended


def code_of(forecast: Forecast) -> int:
    """The exit code that says a verdict."""
    return {"fits": FITS, "tight": TIGHT}.get(forecast.verdict, DOES_NOT_FIT)


def forecast_command(asked: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    """`fitcast forecast`: exit code and what to print."""
    gpu = options.gpu_of(asked)
    recipe = None if asked.file else _recipe(asked)
    f = _forecast(asked, gpu, recipe)
    data = show.file_data(asked.file, f) if recipe is None else show.forecast_data(recipe, f)
    answer = show.as_json(data) if asked.json else show.forecast_text(f)
    return code_of(f), answer


def _forecast(asked: argparse.Namespace, gpu: Gpu, recipe: TrainRecipe | None) -> Forecast:
    """What was asked for: a step of a file or of a recipe; a training step unless it says so."""
    images = options.images_of(asked)
    if ranks.asked_for(asked) and recipe is not None:
        return ranks.forecast_asked(asked, gpu, recipe)
    if asked.step.lower() != "train":
        start.engine()
        return steps.forecast_step_asked(asked, gpu, recipe)
    steps.refuse_numbers(asked)
    if recipe is None:
        start.engine()
        from fitcast.forecasting.files import forecast_file

        return forecast_file(asked.file, gpu, **options.beside_file(asked))
    if images:
        from fitcast.forecasting.by_trainer import forecast_by_trainer

        recipe.check_on(gpu)
        return forecast_by_trainer(recipe, gpu, "its rows hold images", images)
    from fitcast.forecasting.forecast import forecast

    return forecast(recipe, gpu)


def _recipe(asked: argparse.Namespace) -> TrainRecipe:
    """The recipe, with adapters where the model's family has its projections unless they are named.

    Raises:
        ValueError: A value that its field cannot have.
    """
    recipe = options.recipe_of(asked)
    start.engine()
    if hasattr(asked, "lora_targets") or recipe.lora_rank is None:
        return recipe
    from fitcast.forecasting.by_trainer import family_targets

    return dataclasses.replace(recipe, lora_targets=family_targets(recipe.model))


def fit_command(asked: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    """`fitcast fit`: exit code and what to print."""
    gpu, recipe = options.gpu_of(asked), _recipe(asked)
    target = asked.target_effective_batch
    if target is not None:
        target = options.number("target_effective_batch", target, int, "32")
    utilisation = asked.utilisation
    if utilisation is not None:
        utilisation = options.number("utilisation", utilisation, float, "0.3")
    from fitcast.forecasting.strategies import fit

    best = fit(
        recipe,
        gpu,
        target,
        utilisation=utilisation,
        pinned_host_bytes=options.pinned_host_of(asked),
        compiled=asked.compiled,
        progress=progress,
        processes=start.processes(),
    )
    data = show.fit_data(recipe, best)
    return FITS, show.as_json(data) if asked.json else show.fit_text(recipe, best)


def levers_command(asked: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    """`fitcast levers`: exit code, that of the recipe before any change, and what to print."""
    gpu, recipe = options.gpu_of(asked), _recipe(asked)
    from fitcast.forecasting.forecast import forecast
    from fitcast.forecasting.search import levers

    before = forecast(recipe, gpu)
    single = levers(recipe, gpu, progress)
    if asked.json:
        answer = show.as_json(show.levers_data(recipe, before, single))
    else:
        answer = show.levers_text(recipe, before, single)
    return code_of(before), answer


def doctor_command(asked: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    """`fitcast doctor`: exit code and what to print."""
    from fitcast.cli.doctor import doctor

    findings = doctor()
    answer = show.as_json(show.doctor_data(findings)) if asked.json else show.doctor_text(findings)
    return DOES_NOT_FIT if any(finding.fix for finding in findings) else FITS, answer


COMMANDS = {
    "forecast": forecast_command,
    "fit": fit_command,
    "levers": levers_command,
    "doctor": doctor_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What was typed after `fitcast`; by default this process's own.

    Returns:
        The exit code.
    """
    if arguments is not None:
        return _run(arguments)
    start.quickly()
    return start.leave(_run(sys.argv[1:]))


def _run(words: Sequence[str]) -> int:
    """Answer what was typed: the exit code."""
    if not words:
        options.parser().print_help(sys.stderr)
        return BAD_INPUT
    progress = None
    try:
        asked = options.parse(words)
        progress = Progress("looking" if asked.command == "doctor" else "forecasting")
        code, answer = COMMANDS[asked.command](asked, progress)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return DOES_NOT_FIT if isinstance(error, MemoryError) else BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if progress:
            progress.stop()
    _say(answer)
    return code


def _say(answer: str) -> None:
    try:
        print(answer, flush=True)
    except BrokenPipeError:  # `| head -1` has read enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
