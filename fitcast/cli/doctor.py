"""What is this machine, what would break on it, and how to fix that.

Not modelled: whether a given run fits (`forecast`), whether its weights can be had (`preflight`).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from fitcast import gpus
from fitcast.training import host, several
from fitcast.training.versions import FLOORS, Finding, below, drifted, installed, record
from fitcast.units import GIB, show_bytes

DISK_BYTES = 5 * GIB  # a 16-bit checkpoint of Llama-3.2-1B, its adapters and room to write them
TORCHAO_FLOOR = (0, 16)
DEVICES = Path("/dev")  # where Linux shows a program the NVIDIA cards that it may use


@dataclass(frozen=True)
class Space(Finding):
    """A finding about memory or disk, with its numbers; bytes, `None` when nobody can say."""

    total_bytes: int | None = None
    free_bytes: int | None = None


def doctor() -> list[Finding]:
    """Everything looked at, in the order in which a run would meet it."""
    cards = [*_gpus(), *several.together(), _precision(), *_float16()] if installed("torch") else []
    hub = [_hub()] if installed("huggingface_hub") else []
    room = [_disk(), _host()]
    return [_python(), *map(_package, FLOORS), _torchao(), _drift(), *cards, *room, *hub]


def _python() -> Finding:
    old = sys.version_info < (3, 11)
    return Finding(
        "python",
        f"{platform.python_version()} on {platform.machine()}",
        "install Python 3.11 or newer" if old else None,
    )


def _package(name: str) -> Finding:
    floor = ".".join(map(str, FLOORS[name]))
    version = installed(name)
    if version is None:
        return Finding(name, "not installed", f"pip install '{name}>={floor}'")
    old = below(version, FLOORS[name])
    return Finding(name, version, f"pip install '{name}>={floor}', then restart" if old else None)


def _torchao() -> Finding:
    """PEFT refuses an old torchao as soon as the base is not quantized; see `step.compat`."""
    version = installed("torchao")
    if version is None:
        return Finding("torchao", "not installed, not needed")
    old = below(version, TORCHAO_FLOOR)
    return Finding(
        "torchao", f"{version}, too old for PEFT: fitcast looks past it" if old else version
    )


def _drift() -> Finding:
    """Newer than verified is a remark, not a fault: most new versions work."""
    newer = drifted()
    return Finding(
        "verified",
        f"{record()['date']}, "
        + (f"newer here: {', '.join(newer)}" if newer else "nothing here is newer"),
    )


def _gpus() -> list[Finding]:
    """One finding a card: `Trainer`, started as one process, uses all that it sees."""
    compiled = gpus.compiled_for()
    cards = gpus.cards()
    found: list[Finding] = [_card(index, card, compiled) for index, card in enumerate(cards)]
    if emulated := os.environ.get(gpus.EMULATE_VARIABLE):
        found.append(Finding("emulated", f"{emulated}, by {gpus.EMULATE_VARIABLE}"))
    return found if cards else [_no_card()]


def _card(index: int, card: gpus.Card, compiled: tuple[str, ...]) -> Space:
    free, hide = card.free_bytes, f"hide GPU {index} from it with CUDA_VISIBLE_DEVICES"
    fix = None
    if not gpus.has_kernels(card.capability, compiled):
        needed = "sm_{}{}".format(*card.capability)
        fix = (
            f"this PyTorch has kernels for {', '.join(compiled)} and none for {needed}: install a "
            f"build that has it, see pytorch.org/get-started/previous-versions, or {hide}"
        )
    elif free is None:
        fix = f"the card does not answer: see nvidia-smi for who holds it, or {hide}"
    elif free < card.total_bytes // 2:
        fix = "another program or notebook holds most of it: see nvidia-smi, restart that kernel"
    capability = "{}.{}".format(*card.capability)
    room = "memory unknown" if free is None else f"{show_bytes(free)} free"
    return Space(
        f"GPU {index}",
        f"{card.name}, compute capability {capability}, {show_bytes(card.total_bytes)}, {room}",
        fix,
        card.total_bytes,
        free,
    )


def _no_card() -> Finding:
    """No GPU is fine; one that is there and that this PyTorch does not see is not."""
    here = sorted(path.name for path in DEVICES.glob("nvidia[0-9]*"))
    fix = None
    if here and "CUDA_VISIBLE_DEVICES" not in os.environ:
        fix = (
            f"PyTorch {installed('torch')} does not see {', '.join(here)} of {DEVICES}: install a "
            "build with CUDA that this driver can run, see pytorch.org/get-started"
        )
    return Finding("GPU", "none: bytes are counted on the CPU and forecast for a T4", fix)


def _precision() -> Finding:
    choice = gpus.mixed_precision(gpus.detect())
    return Finding("precision", f"{choice.dtype or 'float32'} ({choice.reason})")


def _float16() -> list[Finding]:
    """Families that this card should not train in mixed precision, where float16 is all it has."""
    from fitcast.step.overflow import FAMILIES

    card = gpus.detect()
    if card is None or card.has_bfloat16:
        return []
    names = ", ".join(dict.fromkeys(known.family for known in FAMILIES.values()))
    return [Finding("float16", f"overflows in {names}: train those in float32, or on another card")]


def _host() -> Space:
    """Host memory: merging adapters into their base takes the whole model in 16 bits."""
    total, free = host.memory()
    if total is None or free is None:
        return Space("host memory", "not known on this system")
    billions = free // 2 / 10**9  # 2 bytes a parameter
    return Space(
        "host memory",
        f"{show_bytes(free)} free of {show_bytes(total)}: enough to merge adapters into a base of "
        f"{billions:.1f} billion parameters in 16 bits",
        None,
        total,
        free,
    )


def _disk() -> Space:
    disk = shutil.disk_usage(".")
    missing = DISK_BYTES - disk.free
    return Space(
        "disk",
        f"{show_bytes(disk.free)} free",
        f"free {show_bytes(missing)}, or work in another folder" if missing > 0 else None,
        disk.total,
        disk.free,
    )


def _hub() -> Finding:
    from huggingface_hub import constants

    return Finding(
        "hub",
        "switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE: bundled and local models only"
        if constants.HF_HUB_OFFLINE
        else "allowed (not asked)",
    )
