"""What CUDA's kernels do to memory where a CPU's do something else: one function a rule.

Operations on fake CPU tensors are re-expressed here as the allocations of the CUDA kernel. They
then are ordinary operations, which the ledger below counts like any other. Attention and
bitsandbytes have modules of their own; what libraries do when they see a CUDA device is in
`libraries`.

A rule is called with the GPU, the function or operation that it stands for, and that one's own
arguments; it gives back what that one would, with the memory that it would take on the way.

Not modelled: values; kernels' scratch of a few KiB (reductions, cumulative sums); AMD GPUs.
Sources are files of PyTorch; native/ is aten/src/ATen/native.

Shapes: x is (..., H), H what is normed, dropped or summed over; rows are the numbers before it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from fitcast.cuda import bitsandbytes, experts
from fitcast.cuda.attention import (
    attention_kernel,
    cudnn_attention_backward,
    efficient_attention_backward,
    flash_attention_backward,
    scratch,
)
from fitcast.gpus import Gpu
from fitcast.memory.flops import matrix_flops
from fitcast.memory.ledger import MemoryLedger
from fitcast.memory.report import COMPILED

aten = torch.ops.aten


@contextlib.contextmanager
def cuda_functions(gpu: Gpu) -> Iterator[None]:
    """Replaces functions of `torch.nn.functional` whose CUDA path differs before autograd sees it.

    Patched rather than a function mode: backward would not pass one on to a recomputed forward.
    """
    with contextlib.ExitStack() as stack:
        for name, rule in FUNCTION_RULES.items():
            here = functools.partial(rule, gpu, getattr(F, name))
            stack.enter_context(mock.patch.object(F, name, here))
        yield


def scaled_dot_product_attention(
    gpu: Gpu,
    func: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Autocast casts attention's inputs, last one first, then the GPU's kernel runs.

    Args:
        gpu: Whose kernel.
        func: The function of the same name, not called.
        query: (batch, heads, rows, head_dim).
        key, value: (batch, kv_heads, keys, head_dim).
        attn_mask: Broadcasts to (batch, heads, rows, keys), or `None`.
        dropout_p: Probability of dropping a weight.
        is_causal: Whether row i sees keys up to i only.
        scale: Of the scores; `None` is head_dim ** -0.5.
        enable_gqa: Whether kv_heads may be fewer; the shapes say so here.

    Returns:
        (batch, heads, rows, head_dim).

    Source: aten/src/ATen/autocast_mode.h, whose argument list is evaluated from its end.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
        value, key, query = (t.to(dtype) for t in (value, key, query))
    kernel = attention_kernel(gpu, query, key, value, attn_mask, enable_gqa)
    with torch.autocast("cpu", enabled=False):
        return kernel(query, key, value, attn_mask, dropout_p, is_causal, scale)


def dropout(
    gpu: Gpu,
    func: Callable,
    x: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    """Keeps a byte for each element. Source: native/Dropout.cpp, `is_fused_kernel_acceptable`."""
    if inplace or not training or not 0 < p < 1 or x.numel() == 0:
        return func(x, p, training, inplace)
    return torch.native_dropout(x, p, True)[0]


def softmax(
    kernel: Callable,
    gpu: Gpu,
    func: Callable,
    x: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """One kernel from float16 to float32, no cast before it. Source: native/SoftMax.cpp."""
    if x.dtype == torch.float16 and dtype == torch.float32:
        return kernel(x, dim, True)
    return func(x, dim, _stacklevel, dtype)


def rms_norm(
    gpu: Gpu,
    func: Callable,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """One kernel where the dtypes agree. Source: native/layer_norm.cpp, `rms_norm_symint`."""
    if weight is None or weight.dtype != x.dtype:
        return func(x, normalized_shape, weight, eps)
    return _FusedRmsNorm.apply(x, weight)


class _FusedRmsNorm(torch.autograd.Function):
    """Keeps its input and one float32 a row. Source: native/cuda/layer_norm_kernel.cu."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = torch.empty(*x.shape[:-1], 1)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


FUNCTION_RULES: dict[str, Callable] = {
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "dropout": dropout,
    "softmax": functools.partial(softmax, aten._softmax),
    "log_softmax": functools.partial(softmax, aten._log_softmax),
    "rms_norm": rms_norm,
}

# What Python checks of a compiled function's inputs before it launches takes as long as launching
# so many operations: rows "step, 1 x 512" of tests/data/h200_profile.json.
CHECKS_OF_A_CALL = 4


def one_kernel(
    function: Callable, tensors: tuple[torch.Tensor, ...], part: str
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """A function that torch.compile fuses takes what it gives back, and reads its inputs once.

    Nothing in between is a tensor; a reduction's scratch is a few KiB. The host takes longer to
    call it than an operation. Stands in for `compiled.launch`.

    Args:
        function: Asked for what it gives back, out of sight.
        tensors: Its inputs, fake.
        part: Of the step, which the ledger names as who made the results.

    Source: torch/_inductor/scheduler.py, `fuse_nodes`; tools/race.py's rows hold it.
    """
    modes = _get_current_dispatch_mode_stack()
    kernels: list[Any] = [mode for mode in modes if hasattr(mode, "on_work")]
    with _disable_current_modes(), tensors[0].fake_mode:  # pyright: ignore[reportAttributeAccessIssue]
        results = function(*tensors)
    alone = isinstance(results, torch.Tensor)
    layouts = [(r.shape, r.stride(), r.dtype) for r in ((results,) if alone else results)]
    with contextlib.ExitStack() as stack:
        for mode in modes:
            if isinstance(mode, MemoryLedger):
                stack.enter_context(mode.doing(f"{COMPILED}{part}"))
        made = tuple(
            torch.empty_strided(size, stride, dtype=kind) for size, stride, kind in layouts
        )
    for mode in kernels:
        if mode.on_work is not None:
            mode.on_work(0, tensors, made)
            for _ in range(CHECKS_OF_A_CALL):
                mode.on_work(0, (), ())  # the host's time alone
    return made[0] if alone else made


class CudaKernels(TorchDispatchMode):
    """Re-expresses each operation as what its CUDA kernel allocates, and adds up its work.

    Enter it after the ledger, so that it sees an operation first.

    Attributes:
        gpu: Whose kernels.
        on_work: Called with the FLOPs, the inputs and the result of each operation.
    """

    def __init__(self, gpu: Gpu, on_work: Callable[[int, tuple, object], None] | None = None):
        super().__init__()
        self.gpu, self.on_work = gpu, on_work
        self._workspaces: dict[tuple[str, bool], torch.Tensor] = {}
        holders_of_one()  # measured before this mode is entered

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every operation pays for telling torch.compile to stay away

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # the most frequent question of all
            return args[0].fake_device
        if func is aten.add.Tensor and accumulates(*args[:2]):
            return aten.add_.Tensor(*args[:2])
        name = func.overloadpacket._qualified_op_name
        rule = KERNEL_RULES.get(name)
        result = func(*args, **kwargs) if rule is None else rule(self.gpu, func, *args, **kwargs)
        if name in MATRIX_PRODUCTS:
            self._take_workspace("cublas", self.gpu.workspace_bytes)
        if adds_bias(name, args, kwargs):
            self._take_workspace("cublasLt", LT_WORKSPACE_BYTES)
        if self.on_work is not None and not func.is_view and name not in NO_WORK:
            self.on_work(matrix_flops(func, args, kwargs, result), args, result)
        return result

    def _take_workspace(self, library: str, n_bytes: int) -> None:
        """Libraries keep one for the thread that runs forward and one for autograd's, for good.

        Source: cuda/CublasHandlePool.cpp, `getCUDABlasLtWorkspace` and its caller.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        if (library, in_backward) not in self._workspaces:
            self._workspaces[library, in_backward] = scratch(n_bytes)


def accumulates(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether this is autograd adding a gradient to one that nobody else holds.

    It then adds in place, but never with tensor subclasses, of which a fake tensor is one. Source:
    torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`.
    """
    return (
        torch._C._current_graph_task_id() != -1
        and not torch.is_grad_enabled()
        and isinstance(new, torch.Tensor)
        and old.shape == new.shape
        and is_non_overlapping_and_dense_or_false(old)
        and holders(old) == holders_of_one()
    )


def holders(tensor: Any) -> tuple[int, int]:
    """How many hold a tensor and its storage; a caller in Python counts, too."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@functools.cache
def holders_of_one() -> tuple[int, int]:
    """What `holders` answers for a gradient that autograd alone holds, in this PyTorch."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            if func is aten.add.Tensor and not torch.is_grad_enabled():
                seen.append(holders(args[0]))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        x = torch.ones(2, requires_grad=True) * 1
        (x * 2 + x * 3).sum().backward()
    return seen[0]


def softmax_backward(
    gpu: Gpu, func: Callable, grad: torch.Tensor, output: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """Holds gradient x output besides its result. Source: native/cuda/SoftMax.cu."""
    result = func(grad, output, *rest)
    scratch(grad.numel() * max(grad.itemsize, output.itemsize))
    return result


def logsumexp(gpu: Gpu, func: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Holds exp(x - max), as large as x. Source: native/ReduceOps.cpp, `logsumexp_out_impl`."""
    result = func(x, *args, **kwargs)
    scratch(x.nbytes)
    return result


def mask_before_output(
    gpu: Gpu, func: Callable, x: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask is allocated first. Source: native/cuda/Dropout.cu, `dropout_cuda`."""
    mask = torch.empty_like(x, dtype=torch.bool)
    return torch.empty_like(x), mask


def foreach_norm(
    gpu: Gpu, func: Callable, tensors: Sequence[torch.Tensor], *args: Any, **kwargs: Any
) -> Sequence[torch.Tensor]:
    """A number for each 65 536 elements of the largest tensor, for each tensor; then their norms.

    Source: native/cuda/ForeachReduceOp.cu.
    """
    chunks = max(-(-t.numel() // 65536) for t in tensors)
    partial = torch.empty(len(tensors), chunks)
    result = func(tensors, *args, **kwargs)
    del partial
    return result


def unscale(gpu: Gpu, func: Callable, gradients: Sequence[torch.Tensor], *rest: Any) -> Any:
    """Divides gradients by the loss scale: CUDA has a kernel for each dtype but bfloat16.

    Source: native/cuda/AmpKernels.cu, `_amp_foreach_non_finite_check_and_unscale_cuda_`, whose
    AT_DISPATCH_FLOATING_TYPES_AND_HALF says so.
    """
    if any(gradient.dtype == torch.bfloat16 for gradient in gradients):
        raise NotImplementedError(
            "\"_amp_foreach_non_finite_check_and_unscale_cuda\" not implemented for 'BFloat16'"
        )
    return func(gradients, *rest)


def adds_bias(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether this is a product with a bias, which cuBLASLt computes rather than cuBLAS.

    Source: native/cuda/Blas.cpp, `isInputCompliesAddmmCudaLt`.
    """
    if name == "aten::addmm":
        return args[0].dim() == 1
    return name == "bitsandbytes::gemm_4bit" and (args[6:7] or (kwargs.get("bias"),))[0] is not None


# Source: cuda/CublasHandlePool.cpp, `parseCUDABlasLtWorkspaceSize`: a MiB, not shared by default.
LT_WORKSPACE_BYTES = 1 << 20
MATRIX_PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "bitsandbytes::gemm_4bit",
}
NO_WORK = {  # views, what allocates only, what the host does
    "aten::_local_scalar_dense",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit",
    "aten::_unsafe_view",
    "aten::detach",
    "aten::lift_fresh",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
}
KERNEL_RULES: dict[str, Callable] = {
    "aten::_softmax_backward_data": softmax_backward,
    "aten::logsumexp": logsumexp,
    "aten::native_dropout": mask_before_output,
    "aten::_foreach_norm": foreach_norm,
    "aten::_amp_foreach_non_finite_check_and_unscale_": unscale,
    "aten::_grouped_mm": experts.grouped_mm,
    "aten::_scaled_dot_product_efficient_attention_backward": efficient_attention_backward,
    "aten::_scaled_dot_product_flash_attention_backward": flash_attention_backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": cudnn_attention_backward,
    "bitsandbytes::quantize_4bit": bitsandbytes.scales_before_weight,
    "bitsandbytes::gemm_4bit": bitsandbytes.gemm_4bit,
    "bitsandbytes::optimizer_update_8bit_blockwise": bitsandbytes.updates_in_place,
    "bitsandbytes::optimizer_update_32bit": bitsandbytes.updates_in_place,
}
