"""What is this machine, what would break on it, and how to fix that.

Not modelled: whether a given run fits (`forecast`), whether its weights can be had (`preflight`).
"""

from __future__ import annotations

import platform
import shutil
import sys

from fitcast import gpus
from fitcast.training.versions import FLOORS, Finding, drifted, installed, numbers, record
from fitcast.units import GIB, show_bytes

DISK_BYTES = 5 * GIB  # a 16-bit checkpoint of Llama-3.2-1B, its adapters and room to write them
TORCHAO_FLOOR = (0, 16)


def doctor() -> list[Finding]:
    """Everything looked at, in the order in which a run would meet it."""
    card = [_gpu(), _precision()] if installed("torch") else []
    hub = [_hub()] if installed("huggingface_hub") else []
    return [_python(), *map(_package, FLOORS), _torchao(), _drift(), *card, _disk(), *hub]


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
    return Finding(
        name,
        version,
        None
        if numbers(version) >= FLOORS[name]
        else f"pip install '{name}>={floor}', then restart",
    )


def _torchao() -> Finding:
    """PEFT refuses an old torchao as soon as the base is not quantized; see `step.compat`."""
    version = installed("torchao")
    if version is None:
        return Finding("torchao", "not installed, not needed")
    old = numbers(version) < TORCHAO_FLOOR
    return Finding(
        "torchao", f"{version}, too old for PEFT: the course looks past it" if old else version
    )


def _drift() -> Finding:
    """Newer than verified is a remark, not a fault: most new versions work."""
    newer = drifted()
    return Finding(
        "verified",
        f"{record()['date']}, "
        + (f"newer here: {', '.join(newer)}" if newer else "nothing here is newer"),
    )


def _gpu() -> Finding:
    gpu = gpus.detect()
    if gpu is None:
        return Finding("GPU", "none: bytes are counted on the CPU and forecast for a T4")
    free = gpus.free_bytes() or 0
    found = f"{gpu.name}, {show_bytes(gpu.total_bytes)}, {show_bytes(free)} free"
    busy = free < gpu.total_bytes // 2
    return Finding(
        "GPU",
        found,
        "another program or notebook holds most of it: see nvidia-smi, restart that kernel"
        if busy
        else None,
    )


def _precision() -> Finding:
    choice = gpus.mixed_precision(gpus.detect())
    return Finding("precision", f"{choice.dtype or 'float32'} ({choice.reason})")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    return Finding(
        "disk",
        f"{show_bytes(free)} free",
        None
        if free >= DISK_BYTES
        else f"free {show_bytes(DISK_BYTES - free)}, or work in another folder",
    )


def _hub() -> Finding:
    from huggingface_hub import constants

    return Finding(
        "hub",
        "switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE: bundled and local models only"
        if constants.HF_HUB_OFFLINE
        else "allowed",
    )
