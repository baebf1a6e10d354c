"""Each rule about CUDA against numbers read off a GPU's allocator or off the library's own code."""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from fitcast.cuda import attention
from fitcast.cuda import bitsandbytes as rules
from fitcast.cuda.kernels import CudaKernels, cuda_functions
from fitcast.cuda.libraries import pretend_cuda
from fitcast.forecasting.fake import fake_tensors
from fitcast.gpus import A100, H200, T4
from fitcast.memory.stream import DeviceLedger
from fitcast.units import MIB
from tools.measure_runs import H200_WITH_T4_KERNELS


@contextlib.contextmanager
def watched(gpu=T4):
    ledger, kernels = DeviceLedger(), CudaKernels(gpu)
    with cuda_functions(gpu), fake_tensors(), ledger, kernels:
        yield ledger


def allocated(ledger, at_least=0):
    return [
        ledger._blocks[block].n_bytes
        for sign, block, _ in ledger._events
        if sign > 0 and ledger._blocks[block].n_bytes >= at_least
    ]


def heads(n, rows=512, size=64, dtype=torch.float16, **options):
    return torch.empty(1, n, rows, size, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("gpu", "kv_heads", "dtype", "masked", "size", "kernel"),
    [
        (T4, 8, torch.float16, False, 64, "math"),  # grouped heads without a mask: facts, section 2
        (T4, 32, torch.float16, False, 64, "efficient"),
        (T4, 32, torch.float16, True, 64, "efficient"),
        (T4, 32, torch.float32, False, 64, "efficient"),
        (T4, 32, torch.bfloat16, False, 64, "math"),
        (T4, 32, torch.float16, False, 60, "math"),  # not a multiple of 16 bytes
        (A100, 8, torch.float16, False, 64, "flash"),
        (A100, 8, torch.float16, True, 64, "math"),
        (A100, 32, torch.bfloat16, True, 64, "efficient"),
        (A100, 32, torch.float32, False, 64, "efficient"),
        (A100, 32, torch.float16, False, 512, "efficient"),
        (H200, 8, torch.float16, False, 64, "cudnn"),
        (H200, 8, torch.bfloat16, True, 64, "cudnn"),
        (H200, 32, torch.float16, False, 256, "flash"),
        (H200_WITH_T4_KERNELS, 8, torch.float16, False, 64, "math"),
    ],
)
def test_attention_kernel_is_the_one_that_the_gpu_takes(gpu, kv_heads, dtype, masked, size, kernel):
    with fake_tensors():
        query, key = (heads(n, 16, size, dtype) for n in (32, kv_heads))
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool) if masked else None
        chosen = attention.attention_kernel(gpu, query, key, key, mask)
    assert chosen.__name__ == f"{kernel}_attention"


def attention_backward(gpu, kv_heads, rows=512, masked=False, batch=1, dtype=torch.float16):
    with watched(gpu) as ledger:
        query = torch.empty(batch, 32, rows, 64, dtype=dtype, requires_grad=True)
        key, value = (
            torch.empty(batch, kv_heads, rows, 64, dtype=dtype, requires_grad=True)
            for _ in range(2)
        )
        mask = torch.ones(batch, 1, rows, rows, dtype=torch.bool) if masked else None
        output = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=not masked, enable_gqa=kv_heads < 32
        )
        torch.autograd.grad(output, (query, key, value), torch.empty_like(output))
    return allocated(ledger)


def test_scratch_of_attention_backward_as_read_off_an_h200():
    # tests/data/h200_rules.json, rows 4, 7 and 9: what their allocator traces show
    assert {65536, 4_198_400} <= set(attention_backward(H200_WITH_T4_KERNELS, 32))
    assert 16_908_544 in attention_backward(H200, 8, rows=1024)
    assert 17_039_616 in attention_backward(H200, 32, 1024, True, 2, torch.bfloat16)


def test_math_attention_writes_scores_in_float32():
    with watched() as ledger:
        output = F.scaled_dot_product_attention(
            heads(32), heads(8), heads(8), is_causal=True, enable_gqa=True
        )
    assert output.dtype == torch.float16
    # row 0's trace: q, k, v, scaled q, the mask three times, k and v repeated, scaled k, scores,
    # softmax, a byte a score, its rows, the half copy of the weights, output twice
    inputs, made = allocated(ledger, 16384)[:3], allocated(ledger, 16384)[3:]
    made.remove(T4.workspace_bytes)
    assert inputs == [2097152, 524288, 524288]
    assert made == [
        4194304,
        1048576,
        1048576,
        4194304,
        262144,
        262144,
        1048576,
        4194304,
        4194304,
        4194304,
        33554432,
        33554432,
        8388608,
        16384,
        16777216,
        4194304,
        2097152,
    ]


def test_math_attention_computes_attention():
    torch.manual_seed(0)
    query = torch.randn(2, 4, 8, 16, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 8, 16, dtype=torch.float64)
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    keep = torch.ones(8, 8).tril()
    with torch.no_grad():  # an additive mask, because the rule's own holds no values
        got = attention.math_attention(
            query, key, value, (1 - keep).double() * -1e30, 0.0, False, None
        )
    assert torch.allclose(got, want)


def test_dropout_keeps_a_byte_for_each_element():
    with watched() as ledger:
        F.dropout(torch.empty(1024, 1024, dtype=torch.float16), 0.1)
    assert allocated(ledger)[-2:] == [MIB, 2 * MIB]


@pytest.mark.parametrize(("name", "within"), [("softmax", [4 * MIB]), ("log_softmax", [])])
def test_half_softmax_in_float32_has_no_cast(name, within):
    with watched() as ledger:
        x = torch.empty(1024, 1024, dtype=torch.float16, requires_grad=True)
        y = getattr(F, name)(x, dim=-1, dtype=torch.float32)
        y.backward(torch.empty_like(y))
    #   x, y, gradient of y, gradient of x; of softmax gradient x y inside the kernel
    assert allocated(ledger) == [2 * MIB, 4 * MIB, 4 * MIB, 2 * MIB, *within]


def test_fused_norm_keeps_its_input_and_a_number_a_row():
    with watched() as ledger:
        x = torch.empty(512, 1024, dtype=torch.float16, requires_grad=True)
        weight = torch.empty(1024, dtype=torch.float16)
        F.rms_norm(x, (1024,), weight, 1e-5)
    assert allocated(ledger)[-2:] == [512 * 4, MIB]


@pytest.mark.parametrize(("gpu", "n_bytes"), [(T4, 8_519_680), (H200, 32 * MIB)])
def test_two_threads_take_a_workspace_each_once(gpu, n_bytes):
    with watched(gpu) as ledger:
        weight = torch.empty(64, 64, requires_grad=True)
        for _ in range(3):
            (torch.empty(64, 64) @ weight @ weight).sum().backward()
        assert allocated(ledger, n_bytes) == [n_bytes, n_bytes]


class Note(torch.autograd.Function):
    """Hands its gradient on, doubled or as it came, and notes the storage that it lies in."""

    @staticmethod
    def forward(ctx, x, notes, double):
        ctx.notes, ctx.double = notes, double
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient * 2 if ctx.double else gradient
        fake = isinstance(gradient, FakeTensor)  # a real one's storage, once asked for, is shared
        ctx.notes.append(gradient.untyped_storage()._cdata if fake else gradient.data_ptr())
        return gradient, None, None


def gradient_is_added_in_place(shared: bool) -> bool:
    """Of x used twice: whether its whole gradient lies where its first part lay."""
    parts, whole = [], []
    x = Note.apply(torch.ones(4096, requires_grad=True), whole, False)
    # doubled parts are tensors of their own; others are one, which the sum gives to both
    (Note.apply(x, parts, not shared) + Note.apply(x, parts, not shared)).backward(torch.ones(4096))
    return whole[0] == parts[0]


@pytest.mark.parametrize("shared", [False, True])
def test_gradient_is_added_in_place_where_pytorch_does_so_on_real_tensors(shared):
    with watched():
        got = gradient_is_added_in_place(shared)
    assert got == gradient_is_added_in_place(shared) == (not shared)


@pytest.mark.parametrize(
    ("gpu", "rows", "shape", "fused"),
    [
        (H200, 4, (4096, 2048), True),  # at most 4 rows: always
        (H200, 4096, (4096, 2048), False),  # above 1536 rows: never
        (H200, 512, (512, 2048), False),
        (H200, 512, (14336, 4096), False),
        (T4, 64, (14336, 4096), True),
        (T4, 512, (14336, 4096), False),
    ],
)
def test_bitsandbytes_dequantizes_where_its_own_source_says_so(gpu, rows, shape, fused):
    import bitsandbytes  # noqa: F401  (registers the operation)

    assert rules.has_fused_kernel(gpu, torch.float16, rows, shape, 64) == fused
    with watched(gpu) as ledger:
        torch.ops.bitsandbytes.gemm_4bit(
            torch.empty(rows, shape[1], dtype=torch.float16),
            torch.empty(shape[0] * shape[1] // 2, 1, dtype=torch.uint8),
            list(shape),
            torch.empty(shape[0] * shape[1] // 64),
            64,
            "nf4",
        )
    assert (2 * shape[0] * shape[1] in allocated(ledger)[3:]) == (not fused)


def test_a_misaligned_weight_is_dequantized():
    assert rules.has_fused_kernel(T4, torch.float16, 1, (4096, 2048), 64)
    assert not rules.has_fused_kernel(T4, torch.float16, 1, (4096, 2048 + 32), 64)


def test_asking_bitsandbytes_for_a_cuda_kernel_leaves_the_library_as_it_was():
    import bitsandbytes.cextension as loaded

    def state():
        registered = torch._C._dispatch_has_kernel_for_dispatch_key
        return (
            loaded.lib,
            torch.version.hip,
            hasattr(torch._C, "_cuda_getCurrentRawStream"),
            sys.modules.get("bitsandbytes.backends.cuda.ops"),
            [
                registered(f"bitsandbytes::{name}", "CUDA")
                for name in ("gemm_4bit", "quantize_4bit")
            ],
        )

    before = state()
    rules.cuda_library.cache_clear()
    copy = rules.cuda_library()
    assert state() == before
    assert copy is not before[3] and copy._gemm_4bit_custom_max_m == 1536


def test_paged_state_is_not_the_allocators():
    import bitsandbytes as bnb

    small, large = (torch.nn.Parameter(torch.empty(n)) for n in (90_000, 110_000))
    ledger = DeviceLedger()
    with pretend_cuda(T4), fake_tensors() as mode, ledger, CudaKernels(T4):
        parameters = [torch.nn.Parameter(mode.from_tensor(p.data)) for p in (small, large)]
        optimizer = bnb.optim.PagedAdamW8bit(parameters, lr=1e-3)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    states = [block.n_bytes for block in ledger._blocks if block.phase == "optimizer"]
    assert states.count(90_000) == 2 and 110_000 not in states


def test_adam_updates_all_at_once_as_on_cuda():
    with watched() as ledger, pretend_cuda(T4):
        parameters = [torch.nn.Parameter(torch.empty(1000)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        before = len(ledger._events)
        optimizer.step()
    signs = [
        sign for sign, block, _ in ledger._events[before:] if ledger._blocks[block].n_bytes == 4000
    ]
    assert signs[:8] == [1] * 8  # a copy of each before the first one is freed


def test_pythons_own_scalars_are_on_the_host():
    with watched() as ledger:
        torch.empty(16) * torch.tensor(2.0)
    assert allocated(ledger) == [64, 64]
