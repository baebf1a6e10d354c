"""FLOPs of attention: shared keys and values cost what repeated ones cost, on every torch."""

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from fitcast.memory.flops import BACKWARD, FLOPS, FORWARD

BATCH, HEADS, GROUPS, LENGTH, WIDTH = 2, 8, 2, 16, 4
QUERY, SHARED = torch.empty(BATCH, HEADS, LENGTH, WIDTH), torch.empty(BATCH, GROUPS, LENGTH, WIDTH)
PRODUCT = 2 * BATCH * HEADS * LENGTH * LENGTH * WIDTH  # one of the two of a forward pass


@pytest.mark.parametrize("pair", [QUERY, SHARED], ids=["own heads", "grouped"])
def test_forward_is_two_products_and_backward_five(pair):
    for kernel in FORWARD:
        assert FLOPS[kernel](QUERY, pair, pair, out_val=QUERY) == 2 * PRODUCT
    for kernel in BACKWARD:
        assert FLOPS[kernel](QUERY, QUERY, pair, pair, out_val=(QUERY,) * 3) == 5 * PRODUCT


def test_every_attention_kernel_that_torch_counts_is_covered():
    names = {str(op) for op in flop_registry if "scaled_dot_product" in str(op)}
    assert names == {str(op) for op in (*FORWARD, *BACKWARD)}
    assert len(FLOPS) == len(flop_registry) + 2


def test_matrix_products_are_torchs_own():
    left, right = torch.empty(2, 3), torch.empty(3, 5)
    assert FLOPS[torch.ops.aten.mm](left, right, out_val=left @ right) == 2 * 2 * 3 * 5
