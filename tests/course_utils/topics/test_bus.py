"""What ranks send: counted by hand, beside a group that pretends; two real processes; two GPUs."""

import json
import warnings

import pytest
import torch
import torch.distributed as dist

from course_utils.topics import bus, recorded
from fitcast.forecasting.ranks import pretended_group
from tools import rank_rows


def test_a_bus_notes_each_collective_with_the_bytes_of_the_whole_tensor():
    renamed = warnings.catch_warnings(action="ignore", category=FutureWarning)
    with renamed, pretended_group(4), bus.Bus() as seen:
        dist.all_reduce(torch.zeros(256))
        dist.all_reduce(torch.zeros(256))
        dist.all_gather_into_tensor(torch.zeros(512), torch.zeros(128))
        dist.reduce_scatter_tensor(torch.zeros(64), torch.zeros(256))
        dist.broadcast(torch.zeros(8), 0)  # no model moves
        torch.zeros(3).add(1)
    assert (
        str(seen) == "2 x all-reduce of 1 KiB; 1 x all-gather of 2 KiB; 1 x reduce-scatter of 1 KiB"
    )
    # nccl-tests' factors for 4 ranks: 1.5, 0.75 and 0.75
    assert seen.sent_bytes == 2 * 1024 * 1.5 + 2048 * 0.75 + 1024 * 0.75


def test_the_small_model_is_the_same_in_each_process_and_as_large_as_said():
    one, other = bus.small_model(), bus.small_model()
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    frozen = sum(p.nbytes for p in one.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in bus.trained(one))
    assert (frozen, trained) == (bus.FROZEN_BYTES, bus.TRAINED_BYTES)


SCRIPT = """
import sys
import torch.distributed as dist
from course_utils.topics import bus
dist.init_process_group("gloo")
model = bus.small_model()
bus.backward(bus.wrapped(sys.argv[1], model), bus.my_batches())
bus.tell(rank=dist.get_rank(), norm=bus.norm(model))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_hold_the_gradient_of_both_ones_rows(strategy, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    told = bus.run(file, strategy)
    model = bus.small_model()
    for rank in (0, 1):
        random = torch.Generator().manual_seed(rank)
        for _ in range(2):
            (model(torch.randn(bus.ROWS, bus.WIDTH, generator=random)) / 2).backward()
    grads = torch.cat([p.grad.flatten() for p in bus.trained(model)])
    assert [one["rank"] for one in told] == [0, 1]
    assert [one["norm"] for one in told] == pytest.approx([grads.double().norm().item()] * 2)


def test_where_two_gpus_are_the_lines_run(monkeypatch, capsys):
    bus.on_two_gpus("false")
    assert capsys.readouterr().out == "Nothing was started: these lines want two GPUs.\n"
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    bus.on_two_gpus("ls configs/ddp_2xt4.yaml")
    assert capsys.readouterr().out == "$ ls configs/ddp_2xt4.yaml\nconfigs/ddp_2xt4.yaml\n"
    with pytest.raises(RuntimeError, match="it ended with 1; its last lines say why"):
        bus.on_two_gpus("false")


def test_the_lessons_rows_are_those_that_were_measured():
    measured = json.loads(rank_rows.MEASURED.read_text("utf-8"))
    assert recorded.rows("cards") == rank_rows.rows(measured), "run python -m tools.rank_rows"
    lines = [bus.card(row) for row in recorded.rows("cards")]
    assert " ".join(lines[1].split()) == "llama-3.1-8b ddp 2 x 2048 7.45 GiB 15,824 tokens/s"


def test_a_launched_run_reads_as_the_script_writes():
    assert [bus.launched(row) for row in recorded.rows("gpus")] == [
        "1 x 8 x 4 = 32 sequences of 1024 tokens a step\nstep 12: loss 11.1190, 3,977 tokens/s",
        "2 x 8 x 2 = 32 sequences of 1024 tokens a step\nstep 12: loss 11.1191, 6,662 tokens/s",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_who_dies_after_telling_has_told(tmp_path, told):
    script = tmp_path / "ends.py"
    tells = "bus.tell(rank=dist.get_rank())" if told else ""
    script.write_text(
        "import os\nimport torch.distributed as dist\nfrom course_utils.topics import bus\n"
        f'dist.init_process_group("gloo")\n{tells}\nif dist.get_rank():\n    os.abort()\n'
    )
    if told:
        assert bus.run(script) == [{"rank": 0}, {"rank": 1}]
    else:
        with pytest.raises(RuntimeError, match="a rank failed"):
            bus.run(script)
