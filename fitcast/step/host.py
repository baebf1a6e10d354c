"""What waits in host memory: layers' checkpoints, copied beside the step's own work.

A copy to or from the host can run while the GPU computes, if the host's memory is locked (pinned)
and the copy is on a stream of its own. Not modelled: several GPUs in one process.

Shapes: B batch, S sequence, H hidden.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterator
from typing import Any

import torch


def locked_memory(n_bytes: int, device: torch.device) -> torch.Tensor:
    """So many bytes of host memory, uint8, that a GPU copies to and from by itself.

    PyTorch's own pinned memory takes the next power of two: 512 MiB for a checkpoint of 384. Here
    pages of their own are locked, as many as are needed, until the tensor is gone.

    Source: aten/src/ATen/core/CachingHostAllocator.h, `allocate`; CUDA, `cudaHostRegister`.
    """
    if device.type != "cuda":
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
    cuda: Any = torch.get_device_module(device)
    memory = torch.frombuffer(mmap.mmap(-1, n_bytes), dtype=torch.uint8)
    cuda.check_error(cuda.cudart().cudaHostRegister(memory.data_ptr(), n_bytes, 0))
    unlock = weakref.finalize(memory, cuda.cudart().cudaHostUnregister, memory.data_ptr())
    unlock.atexit = False
    return memory


def copy(to: torch.Tensor, tensor: torch.Tensor) -> None:
    """Begin to copy; a GPU's stream does it in its turn."""
    to.copy_(tensor, non_blocking=True)


class Waiting:
    """A checkpoint in host memory.

    Attributes:
        host: The tensor there.
        device: Where it was.
        before: The checkpoint that backward asks for next, if it still waits.
        back: The tensor on its device again, from when that copy has begun.
        arrived: When it is done.
    """

    def __init__(self, owner: HostCheckpoints, tensor: torch.Tensor):
        self._owner, self._memory = owner, owner.take(tensor)
        self.host = self._memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.device, self.before = tensor.device, lambda: None
        self.back: torch.Tensor | None = None
        self.arrived: Any = None

    def __del__(self) -> None:
        self._owner.free.append(self._memory)  # backward is done with it


class HostCheckpoints:
    """Checkpoints of layers in locked host memory, which every step uses again.

    Saves (batch, seq, hidden) a layer on the GPU. The copy out runs while its layer computes.

    Args:
        ahead: Whether a copy back begins one layer early, so that backward does not wait for it.
            Costs one checkpoint more on the GPU.

    Attributes:
        n_bytes: Locked memory, in use or not.
        free: What of it is not in use.
    """

    def __init__(self, ahead: bool):
        self.n_bytes = 0
        self.free: list[torch.Tensor] = []
        self._ahead, self._streams = ahead, {}
        self._last: Any = lambda: None

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Locked memory for a tensor; of a step before, if there is enough of it.

        Where all that is free is too small, some of it goes: with each batch that is longer than
        those before, a second set would be locked beside the first, and a third.
        """
        for index, memory in enumerate(self.free):
            if memory.nbytes >= tensor.nbytes:
                return self.free.pop(index)
        if self.free:
            gpu: Any = torch.get_device_module(tensor.device)
            gpu.synchronize()  # a copy from it may be under way
            self.n_bytes -= self.free.pop().nbytes
        self.n_bytes += tensor.nbytes
        return locked_memory(tensor.nbytes, tensor.device)

    @contextlib.contextmanager
    def of_layer(self, first: bool) -> Iterator[None]:
        """Inside, where a layer computes, what its checkpoint keeps is copied out.

        The GPU goes on behind it when the copy is done: until then the tensor is there anyway.

        Args:
            first: Whether no layer before has its checkpoint here.
        """
        if first:
            self._last = lambda: None
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        if (waiting := self._last()) is not None:
            gpu: Any = torch.get_device_module(waiting.device)
            gpu.current_stream(waiting.device).wait_stream(self._beside(waiting.device))

    @contextlib.contextmanager
    def behind(self) -> Iterator[None]:
        """Inside, where the next layer computes, its checkpoint stays.

        Its backward begins the first copy back.
        """

        def unpack(kept: tuple[torch.Tensor, Any]) -> torch.Tensor:
            self._fetch_ahead(kept[1]())
            return kept[0]

        last = self._last
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, last), unpack):
            yield

    def _beside(self, device: torch.device) -> Any:
        """The stream of the copies."""
        if device not in self._streams:
            gpu: Any = torch.get_device_module(device)
            with gpu.device(device) if device.type == "cuda" else contextlib.nullcontext():
                self._streams[device] = gpu.Stream()
        return self._streams[device]

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not tensor.numel():  # PyTorch's checkpoint keeps an empty one, too
            return tensor
        waiting = Waiting(self, tensor)
        self._copy_beside(tensor.device, waiting.host, tensor)
        waiting.before, self._last = self._last, weakref.ref(waiting)
        return waiting

    def _unpack(self, waiting: Any) -> torch.Tensor:
        if not isinstance(waiting, Waiting):
            return waiting
        back = self._fetch(waiting)
        gpu: Any = torch.get_device_module(waiting.device)
        gpu.current_stream(waiting.device).wait_event(waiting.arrived)
        waiting.back = None  # whose memory is the step's again
        self._fetch_ahead(waiting.before())
        return back

    def _fetch_ahead(self, waiting: Waiting | None) -> None:
        if self._ahead and waiting is not None:
            self._fetch(waiting)

    def _fetch(self, waiting: Waiting) -> torch.Tensor:
        """The tensor on its device, where it is from when `arrived` is over."""
        if waiting.back is None:
            waiting.back = torch.empty_like(waiting.host, device=waiting.device)
            waiting.arrived = self._copy_beside(waiting.device, waiting.back, waiting.host)
        return waiting.back

    def _copy_beside(self, device: torch.device, to: torch.Tensor, tensor: torch.Tensor) -> Any:
        """Copy on the stream of the copies, after all that the step has asked for so far.

        Returns:
            The event that it is done.
        """
        gpu: Any = torch.get_device_module(device)
        stream = self._beside(device)
        stream.wait_stream(gpu.current_stream(device))
        with gpu.stream(stream):
            copy(to, tensor)
        return stream.record_event()
