"""PyTorch's fake tensors with a memory: twice as fast where the same shapes come again.

Layer after layer, once more in backward, forecast after forecast, the same operations meet the same
shapes. `FakeTensorMode` works each one out in Python. This mode lets it do so once, notes what came
of it, and makes the same again.

It notes only what layouts and plain arguments decide. The rest it leaves to PyTorch: other devices
than the CPU, sparse tensors, tensors whose number is known.

Source: torch/_subclasses/fake_tensor.py, whose own cache asks for more and takes longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CPU = torch.device("cpu")
REMEMBERED = 20_000  # operations; a forecast of new shapes adds some hundreds


class _Unclear(Exception):
    """More than layouts and plain arguments may decide."""


class FastFakeMode(FakeTensorMode):
    """Answers an operation from memory where it can."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self._known: dict[tuple, tuple] = {}
        self._attributes: dict[str, Any] = {}  # of a fake tensor, the same for each

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every operation pays for telling torch.compile to stay away

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, tensors = kwargs or {}, []
        try:
            surroundings = torch.get_default_dtype(), torch.is_inference_mode_enabled()
            question = func, surroundings, _described((args, *kwargs.items()), tensors)
            answer = self._known.get(question)
        except (_Unclear, TypeError):  # TypeError: an argument without a hash
            return self.dispatch(func, types, args, kwargs)
        if answer is not None:
            container, notes = answer
            made = [self._make(tensors, *note) for note in notes]
            return container(made) if container else made[0]
        before = [_layout(t) for t in tensors]
        result = self.dispatch(func, types, args, kwargs)
        if [_layout(t) for t in tensors] == before and torch.Tag.inplace_view not in func.tags:
            self._remember(question, result, tensors)
        return result

    def _remember(self, question: tuple, result: Any, tensors: list[FakeTensor]) -> None:
        """Note of each tensor made: which argument it is or views (`None`: neither), its layout."""
        container = next((kind for kind in (tuple, list) if isinstance(result, kind)), None)
        homes = {t.untyped_storage()._cdata: i for i, t in enumerate(tensors)}
        ambiguous, notes = len(homes) < len(tensors), []  # two arguments share a storage
        made: list[Any] = list(result) if container else [result]
        for tensor in made:
            if not _is_plain(tensor):
                return
            storage, layout = tensor.untyped_storage()._cdata, _layout(tensor)
            home = homes.get(storage)
            note = home, None if home is not None and tensors[home] is tensor else layout
            self._attributes = self._attributes or dict(vars(tensor) if note[1] else ())
            if (
                home is not None
                and (ambiguous or home < 0)
                or _layout(self._make(tensors, *note)) != layout
            ):
                return
            homes.setdefault(storage, -1)  # new; a second result in it would be one too many
            notes.append(note)
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[question] = container, notes

    def _make(self, tensors: list, home: int | None, layout: tuple | None) -> FakeTensor:
        if layout is None:
            assert home is not None  # without a layout it is an argument itself
            return tensors[home]
        (size, stride, offset, dtype, _), *_ = layout
        if home is None:
            plain = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        else:
            plain = torch.empty(0, dtype=dtype, device="meta")
            plain.set_(tensors[home].untyped_storage(), offset, size, stride)
        made = torch.Tensor._make_subclass(
            FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=CPU
        )
        torch._C._set_throw_on_mutable_data_ptr(made)  # as in FakeTensor.__new__
        vars(made).update(self._attributes)
        return made


def _described(value: Any, tensors: list[Any]) -> tuple:
    """An argument as part of a question; its tensors are collected."""
    kind = value.__class__
    if isinstance(value, torch.Tensor):
        if not _is_plain(value):
            raise _Unclear
        tensors.append(value)
        return _described_tensor(value)
    if kind is tuple or kind is list:
        return kind, *[_described(item, tensors) for item in value]
    return kind, value  # the kind, too: 1 == 1.0 == True


def _is_plain(tensor: object) -> bool:
    """Whether this is a dense fake tensor on the CPU whose number nobody knows."""
    return (
        isinstance(tensor, FakeTensor)
        and tensor.constant is None
        and tensor.fake_device == CPU
        and tensor.layout is torch.strided
    )


def _described_tensor(tensor: torch.Tensor) -> tuple:
    """Its layout; conjugates, zero tensors and inference tensors differ in their dispatch keys."""
    return (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        torch._C._dispatch_keys(tensor).raw_repr(),
    )


def _layout(tensor: torch.Tensor) -> tuple:
    return _described_tensor(tensor), tensor.requires_grad, tensor.untyped_storage().nbytes()
