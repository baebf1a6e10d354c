"""FLOPs of attention: shared keys and values cost what repeated ones cost, on every torch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fitcast.memory.flops import BACKWARD, FLOPS, FORWARD, grouped_flops

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


def test_products_of_groups_cost_what_each_group_costs():
    """Three experts with 2, 5 and 1 rows, against PyTorch's own count of their products."""
    rows, weights = torch.ones(8, 4), torch.ones(3, 4, 6)
    ends = torch.tensor([2, 5 + 2, 8])
    groups = list(torch.tensor_split(rows, ends[:-1]))
    gradients = torch.tensor_split(torch.ones(8, 6), ends[:-1])

    def counted(*pairs):
        with FlopCounterMode(display=False) as counter:
            for left, right in pairs:
                left @ right
        return counter.get_total_flops()

    assert grouped_flops(rows, weights) == counted(*zip(groups, weights, strict=True))
    columns = [group.T for group in groups]
    of_weights = counted(*zip(columns, gradients, strict=True))
    assert grouped_flops(rows.T, torch.cat(gradients)) == of_weights
    transposed = weights.transpose(1, 2)
    assert grouped_flops(transposed, rows.T) == counted(*zip(transposed, columns, strict=True))
    assert grouped_flops(weights, transposed) == counted(*zip(weights, transposed, strict=True))
