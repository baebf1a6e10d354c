"""Kernels that begin where the libraries are imported: one process imports, each kernel is a fork.

Importing torch, transformers, PEFT and matplotlib takes six seconds of each lesson's processor
time; here once for all lessons that a process executes. The parent of the forks only imports: it
computes nothing, starts no thread, and sees no module of this repository. What is committed was
executed by `make execute` in kernels of their own, and `make test` compares: a lesson that leans on
what another left behind, or on an import that is not its own, would differ there.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

from jupyter_client.manager import AsyncKernelManager

from tools.surroundings import ENVIRONMENT, ROOT

LIBRARIES = (
    "ipykernel.kernelapp", "matplotlib.pyplot", "matplotlib_inline.backend_inline", "ipywidgets",
    "torch", "bitsandbytes", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "peft",
)  # fmt: skip
_asking = threading.Lock()


def possible(environment: Mapping[str, str]) -> bool:
    """Whether kernels can be forked: on Linux, and where CUDA, which forbids it, sees no GPU."""
    hidden = environment.get("CUDA_VISIBLE_DEVICES") == "" or not shutil.which("nvidia-smi")
    return sys.platform == "linux" and hidden


class ForkedKernelManager(AsyncKernelManager):
    """Starts kernels as forks; all else is Jupyter's."""

    async def _async_launch_kernel(self, kernel_cmd: list[str], **kw: Any) -> None:
        provisioner: Any = self.provisioner
        provisioner.process = _Process(_fork(kernel_cmd[3:], str(kw["cwd"]), kw["env"]))
        provisioner.pid = provisioner.pgid = provisioner.process.pid
        self._reconcile_connection_info(provisioner.connection_info)


class _Process:
    """A process that is not our child, as far as Jupyter asks a `Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid = pid
        self.handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self) -> int | None:
        return self._ended(None)

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self.handle, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _ended(self, seconds: float | None) -> int | None:
        """Its exit code is its parent's to know: 0 says no more than that it ended."""
        return 0 if select.select([self.handle], [], [], seconds)[0] else None


def _fork(arguments: list[str], folder: str, environment: Mapping[str, str]) -> int:
    """The process id of a new kernel."""
    with _asking:
        parent = _parent()
        asked = dict(arguments=arguments, folder=folder, environment=dict(environment))
        parent.stdin.write(json.dumps(asked) + "\n")
        parent.stdin.flush()
        return int(parent.stdout.readline())


@functools.cache
def _parent() -> Any:
    """The process that imports; it ends when this one does."""
    parent = subprocess.Popen(
        [sys.executable, "-m", "tools.preloaded"], cwd=ROOT, env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    atexit.register(parent.communicate)
    return parent


def serve() -> None:
    """Import, then fork a kernel for each line of standard input and say its process id."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no kernel's search for rubbish copies these pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel asks nobody to wait for it
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become_kernel(**json.loads(line))
        print(pid, flush=True)


def _become_kernel(arguments: list[str], folder: str, environment: dict[str, str]) -> NoReturn:
    """What `python -m ipykernel_launcher` does in a new process."""
    from ipykernel import kernelapp

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.remove(str(ROOT))
    sys.argv[1:] = arguments
    for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
        del sys.modules[name]
    kernelapp.launch_new_instance()
    os._exit(0)


if __name__ == "__main__":
    serve()
