"""The mode that remembers against PyTorch's own, which works everything out."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from course_utils.fake_mode import FastFakeMode

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
    "named": lambda x, n: [*torch.nn.functional.nll_loss(x[None, :2, 0], n[:1] * 0)[None]],
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
    return [(t.shape, t.stride(), t.storage_offset(), t.dtype, str(t.device), t.requires_grad,
             type(t.grad_fn).__name__, t._is_view(), t.untyped_storage().nbytes(),
             storages.index(storage)) for t, storage in zip(made, storages, strict=True)]


@pytest.mark.parametrize("name", CALLS)
def test_remembered_is_what_pytorch_works_out(name):
    plain = FakeTensorMode(allow_non_fake_inputs=True)
    assert seen(FastFakeMode(), CALLS[name], repeats=3) == seen(plain, CALLS[name], repeats=1)


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
    monkeypatch.setattr("course_utils.fake_mode.REMEMBERED", 10)
    mode = FastFakeMode()
    with mode:
        for n in range(1, 50):
            assert (torch.empty(n) + 1).shape == (n,)
    assert len(mode._known) <= 10
