"""What a step of the reader's own needs around it, and what it is told when it cannot be run.

Its optimizers may have been made before: they work on the fake parameters meanwhile, from no state,
and find their own again. A question for a tensor's numbers is refused by the line that asks it.
"""

from __future__ import annotations

import contextlib
import gc
import linecache
import site
import sysconfig
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from fitcast.gpus import Gpu
from fitcast.memory.stream import DeviceLedger
from fitcast.units import Said, refusal

LIBRARIES = (
    Path(__file__).parents[1],
    *(Path(path) for path in {*site.getsitepackages(), *sysconfig.get_paths().values()}),
)
# Part of an error's text -> what to write instead of the line.
NUMBERS = {
    "_local_scalar_dense": "keep loss.detach() and read it after the step, and write the branch "
    "that trains instead of an `if` on a tensor",
    "nonzero": "a mask's size is in its numbers: take a slice as long as the longest, x[:, :n]",
    "masked_select": "a mask's size is in its numbers: take a slice as long as the longest",
    ".numpy() is not supported": "keep it a tensor, and make an array of it after the step",
    "unsupported format string": "print it after the step",
}
OTHERS = "do it after the step"
NOTHING = (
    "the step makes no tensor on the card, so this is the model alone: let it run the model that "
    "it is given, forward, backward and update"
)


def check(model: object, step: object, gpu: object) -> None:
    """Refuse what is no module, no function or no card, before anything is run.

    Raises:
        ValueError: One of them is something else; the remedy says how to come by it.
    """
    if not isinstance(model, torch.nn.Module):
        remedy = "make one of a name by fake_model(name)"
        raise refusal("model", "be a torch.nn.Module", model, remedy)
    if not callable(step):
        remedy = "write `def step(model):` with forward, backward and update in it"
        raise refusal("step", "be a function that takes the model", step, remedy)
    if not isinstance(gpu, Gpu):
        remedy = "for example gpu=fitcast.preset('L4')"
        raise refusal("gpu", "be a card of fitcast", gpu, remedy)


@contextlib.contextmanager
def optimizers_of(model: torch.nn.Module, before: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, optimizers that were made over the model's parameters are over its fake ones.

    Args:
        model: On fake tensors.
        before: Its parameters by name, as they were.
    """
    fakes = dict(model.named_parameters(remove_duplicate=False))
    now = {id(parameter): fakes[name] for name, parameter in before.items()}
    found = [(optimizer, dict(vars(optimizer))) for optimizer in _optimizers(now)]
    for optimizer, _ in found:
        optimizer.state = defaultdict(dict)
        optimizer.param_groups = [
            group | {"params": [now.get(id(p), p) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
    try:
        yield
    finally:
        for optimizer, kept in found:
            vars(optimizer).clear()
            vars(optimizer).update(kept)


def _optimizers(parameters: dict[int, Any]) -> list[Any]:
    """Those alive that work on one of these parameters, by id."""
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.optim.Optimizer)
        and any(id(p) in parameters for group in thing.param_groups for p in group["params"])
    ]


@contextlib.contextmanager
def new_parameters_watched(ledger: DeviceLedger, model: torch.nn.Module) -> Iterator[None]:
    """Inside, a model that comes with new trainable parameters (adapters) is watched as well."""
    known = {id(parameter) for parameter in model.parameters()}

    def look(module: torch.nn.Module, _: Any) -> None:
        if len(ledger._modules) > 1:  # within a model that is running
            return
        watched = {id(parameter()) for parameter in ledger._trainable}  # of modules beside it
        new = {id(p) for p in module.parameters() if p.requires_grad} - known - watched
        if new:
            known.update(new)
            ledger.watch(module)

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def explained(error: Exception) -> Exception:
    """What a step raised, as a sentence where fake tensors are the reason; else the error itself.

    A question for numbers is quoted from the reader's own line, in a script or in a notebook.
    """
    if isinstance(error, fake_tensor.UnsupportedFakeTensorException):
        return refusal(
            "step", "use operations with a fake version", Said(error), "write it with PyTorch's own"
        )
    for applies, rule, remedy in REASONS:
        if applies(error):
            return refusal("step", rule, Said(readers_line(error)), remedy)
    kind = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    text = str(error)
    remedy = next((remedy for part, remedy in NUMBERS.items() if part in text), None)
    asks = isinstance(error, kind) or isinstance(error.__cause__, kind)
    if not asks and (remedy is None or isinstance(error, ValueError)):
        return error
    return refusal(
        "step", "not ask a tensor for its numbers", Said(readers_line(error)), remedy or OTHERS
    )


def _compiles(error: Exception) -> bool:
    """Whether torch.compile was at work, or about to begin."""
    calls = traceback.extract_tb(error.__traceback__)
    return type(error).__module__.startswith("torch._dynamo") or any(
        call.name == "compile_wrapper" and "_dynamo" in Path(call.filename).parts for call in calls
    )


def _saves(error: Exception) -> bool:
    """Whether fake tensors were to be written: pickled, or by safetensors."""
    files = [Path(call.filename) for call in traceback.extract_tb(error.__traceback__)]
    return "WeakValueDictionary" in str(error) or any("safetensors" in file.parts for file in files)


# When it applies, what a step must, and what to change.
REASONS = (
    (_compiles, "not compile", "forecast it without torch.compile, whose kernels are not modelled"),
    (_saves, "not save fake tensors", "save after the step: it takes nothing more of the card"),
)


def readers_line(error: Exception) -> str:
    """The reader's line that led to an error, and where a library asked in its stead."""
    calls = traceback.extract_tb(error.__traceback__)
    theirs = [call for call in calls if not _in_a_library(call.filename)]
    if not theirs:
        return str(error)
    line = theirs[-1]
    text = (line.line or linecache.getline(line.filename, line.lineno or 0)).strip()
    where = f"`{text}` in {Path(line.filename).name}, line {line.lineno}"
    below = calls[calls.index(line) + 1 :]
    asked = [call for call in below if not {"torch", "_dispatch"} & set(Path(call.filename).parts)]
    asked = [call for call in asked if Path(__file__).parents[1] not in Path(call.filename).parents]
    return f"{where}, from {Path(asked[-1].filename).name}:{asked[-1].lineno}" if asked else where


def _in_a_library(filename: str) -> bool:
    path = Path(filename)
    return filename.startswith("<frozen") or any(root in path.parents for root in LIBRARIES)
