"""A T4 emulated on a larger card: its kernels, its memory, and afterwards everything as before."""

import pytest
import torch

from fitcast import gpus
from fitcast.gpus import T4
from fitcast.units import MIB


@pytest.mark.skipif(
    not torch.cuda.is_available() or gpus.free_bytes() < 2 * T4.total_bytes,
    reason="emulates a T4 on a larger GPU",
)
def test_the_emulated_t4_has_its_kernels_and_its_memory_and_ends():
    def switches():
        return torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()

    def allocate(n_bytes):
        return torch.empty(n_bytes, dtype=torch.uint8, device="cuda").nbytes

    before, too_much = switches(), T4.usable_bytes + MIB
    assert before == (True, True) and gpus.detect() != T4
    with gpus.emulate(T4):
        assert switches() == (False, False) and gpus.detect() == T4
        assert allocate(too_much // 2)
        with pytest.raises(torch.OutOfMemoryError):
            allocate(too_much)
    assert switches() == before and gpus.detect() != T4
    assert allocate(too_much) == too_much
