"""The memory of the machine itself, beside that of its GPUs. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from fitcast.units import KIB


def memory() -> tuple[int | None, int | None]:
    """Bytes of this machine's memory, all of it and what programs can have now; `None`: unknown.

    What a container is limited to counts, where the kernel says it. Source: Linux, proc(5) and
    cgroup v2's memory.max.
    """
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:  # not Linux
        return None, None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total, free = kib["MemTotal"] * KIB, kib.get("MemAvailable", kib["MemFree"]) * KIB
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text("ascii").strip()
        used = int((folder / "memory.current").read_text("ascii"))
    except (OSError, ValueError):
        return total, free
    if limit.isdigit():  # else "max"
        total, free = min(total, int(limit)), min(free, max(0, int(limit) - used))
    return total, free
