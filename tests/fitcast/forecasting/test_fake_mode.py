"""The mode that remembers against PyTorch's own, which works everything out."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fitcast.forecasting.fake_mode import FastFakeMode

CALLS = {
    "new": lambda x, n: x * 2.5,
    "promoted by a number's kind": lambda x, n: [n * 1, n * 1.0, n * True],
    "promoted by a tensor's": lambda x, n: x.half() + x,
    "view": lambda x, n: x.t()[1:, ::2],
    "view of a view": lambda x, n: x[2:].reshape(-1)[4:].view(2, -1),
    "argument itself": lambda x, n: x.mul_(3).add_(x),
    "several": lambda x, n: [*torch.var_mean(x, 0), *x.split(2), *x.chunk(3, 1)],
    "one list in, one out": lambda x, n: [*torch._foreach_mul([x, x[1:]], 2.0)],
    "given dtype": lambda x, n: torch.zeros(3, dtype=torch.int8).to(torch.float64),
    "strides of the input": lambda x, n: torch.empty_like(x.t()),
    "another shape in place": lambda x, n: x.clone().t_(),
    "a named tuple": lambda x, n: list(torch.ops.aten.nll_loss_forward(x[:3], n, None, 1, -100)),
    "conjugate": lambda x, n: [x.to(torch.complex64).conj().imag, x.cfloat().conj().resolve_conj()],
    "another storage": lambda x, n: [y := x.clone(), y.set_(x.detach() + 1), y.view(-1)],
    "a number that is known": lambda x, n: [n * torch.tensor(2).item(), torch.tensor([3.0]) * 2],
}


def seen(mode, call, repeats):
    """Layouts of the tensors that a call makes, their grad functions, and what shares a storage."""
    with mode:
        for _ in range(repeats):
            x, n = torch.empty(6, 8), torch.zeros(3, dtype=torch.long)
            weight = torch.empty(6, 8, requires_grad=True)
            made = []
            for first in (x, weight + 0):
                result = call(first, n)
                made += [x, n, *(result if isinstance(result, list) else [result])]
    storages = [t.untyped_storage()._cdata for t in made]
    return [
        (
            t.shape,
            t.stride(),
            t.storage_offset(),
            t.dtype,
            str(t.device),
            t.requires_grad,
            type(t.grad_fn).__name__,
            t._is_view(),
            t.untyped_storage().nbytes(),
            storages.index(storage),
        )
        for t, storage in zip(made, storages, strict=True)
    ]


@pytest.mark.parametrize("name", CALLS)
def test_remembered_is_what_pytorch_works_out(name):
    plain = FakeTensorMode(allow_non_fake_inputs=True)
    assert seen(FastFakeMode(), CALLS[name], repeats=3) == seen(plain, CALLS[name], repeats=1)


class Returned(TorchDispatchMode):
    """What comes out of each operation, as a mode above sees it."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.results.append(func(*args, **(kwargs or {})))
        return self.results[-1]


def test_which_of_two_equal_arguments_is_not_mixed_up():
    with FastFakeMode(), Returned() as seen:
        for _ in range(2):
            x, y = torch.empty(3), torch.empty(3)
            for left, right in ((x, x), (x, y), (y, x)):
                left.mul_(right)
                assert seen.results[-1] is left


def test_what_changes_a_tensor_is_done_each_time():
    with FastFakeMode():
        for _ in range(2):
            x, y = torch.empty(3), torch.empty(3)
            x.set_(y)
            assert x.untyped_storage()._cdata == y.untyped_storage()._cdata


def test_default_dtype_decides_too():
    with FastFakeMode():
        for _ in range(2):
            for dtype in (torch.float32, torch.float16):
                torch.set_default_dtype(dtype)
                try:
                    assert (torch.zeros(2, dtype=torch.long) / 2).dtype == dtype
                finally:
                    torch.set_default_dtype(torch.float32)


def test_inference_mode_decides_too():
    with FastFakeMode() as mode:
        layer = torch.nn.Linear(4, 4)
        x = torch.empty(2, 4)
        for inference in (False, True, False, True):
            with torch.inference_mode(inference):
                assert layer(x).is_inference() == inference
                assert layer(x).view(8).requires_grad == (not inference)
        with torch.inference_mode():
            made = torch.empty(4, 4)
        assert [made.view(16).is_inference() for _ in range(3)] == [True] * 3
        assert mode._known


def test_a_mark_on_one_tensor_is_not_on_others():
    with FastFakeMode():
        marked = torch.empty_like(torch.empty(3, device="meta"), device="cpu")
        marked.mark = "mine"
        marked.mul_(2)
        assert not any(hasattr(torch.empty(3) + 1, "mark") for _ in range(3))


def test_second_time_is_from_memory(monkeypatch):
    asked, work_out = [], FakeTensorMode.dispatch

    def dispatch(mode, func, *rest):
        asked.append(func)
        return work_out(mode, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "dispatch", dispatch)
    with FastFakeMode():
        x = torch.empty(4, 6)
        for size, new in ((4, True), (4, False), (3, True), (3, False)):
            asked.clear()
            (x[:size] @ x.t()).relu_()
            worked_out = set(asked) - {torch.ops.prim.device.default}
            assert bool(worked_out) == new, (size, worked_out)


def test_numbers_are_never_remembered():
    with FastFakeMode():
        assert [torch.tensor(value).item() for value in (1.0, 2.0, 3.0)] == [1.0, 2.0, 3.0]
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            torch.empty(()).item()


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("fitcast.forecasting.fake_mode.REMEMBERED", 10)
    mode = FastFakeMode()
    with mode:
        for n in range(1, 50):
            assert (torch.empty(n) + 1).shape == (n,)
    assert len(mode._known) <= 10
