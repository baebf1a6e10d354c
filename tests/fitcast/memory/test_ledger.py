"""The ledger against witnesses of its own: autograd's graph, tensor sizes, the CUDA allocator."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from fitcast.memory.ledger import MemoryLedger
from fitcast.memory.report import CATEGORIES

BATCH, SEQ, HIDDEN = 2, 32, 64


def graph_saved_bytes(output, excluded):
    """Bytes that autograd's graph holds, each storage once: the witness. `excluded`: tensors.

    A Python number in a product (`x * 0.5`) is kept as a float64 scalar, never on the device.
    """
    skip = {t.untyped_storage()._cdata for t in excluded}
    saved, seen, waiting = {}, set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        if "_raw_saved_tensors" in dir(node):
            held = list(node.saved_tensors)
        else:
            held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in held:
            for tensor in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.float64:
                    storage = tensor.untyped_storage()
                    if storage._cdata not in skip:
                        saved[storage._cdata] = storage.nbytes()
    return sum(saved.values())


def block_config(attention):
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=64,
    )
    config._attn_implementation = attention
    return config


def block(attention, lora=False):
    """A Llama layer as a function of its hidden states, and its parameters."""
    layer = LlamaDecoderLayer(block_config(attention), layer_idx=0)
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        layer = inject_adapter_in_model(
            LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]), layer
        )
    cos_sin = LlamaRotaryEmbedding(block_config(attention))(
        torch.zeros(BATCH, SEQ, HIDDEN), torch.arange(SEQ)[None]
    )
    mask = torch.zeros(1, 1, SEQ, SEQ) if attention == "eager" else None
    given = [t for t in (*cos_sin, mask) if t is not None]
    return layer, given, lambda x: layer(x, position_embeddings=cos_sin, attention_mask=mask)


def mlp():
    layer = nn.Sequential(nn.Linear(HIDDEN, 160), nn.GELU(), nn.Dropout(0.1), nn.Linear(160, 7))
    return layer, [], layer


CASES = {
    "mlp": mlp,
    "llama block, eager": lambda: block("eager"),
    "llama block, sdpa": lambda: block("sdpa"),
    "llama block, eager, lora": lambda: block("eager", lora=True),
    "llama block, sdpa, lora": lambda: block("sdpa", lora=True),
}


@pytest.mark.parametrize("name", CASES)
def test_saved_bytes_equal_autograds_own_to_the_byte(name):
    model, given, run = CASES[name]()
    x = torch.randn(BATCH, SEQ, HIDDEN, requires_grad=True)
    with MemoryLedger(model, inputs=(x, given)) as ledger:
        output = run(x)
        expected = graph_saved_bytes(output, [x, *given, *model.parameters()])
        output.sum().backward()
    assert ledger.report().saved_activation_bytes == expected > BATCH * SEQ * HIDDEN * 4


def test_checkpointing_saves_only_the_boundaries():
    model, given, run = block("sdpa")
    x = torch.randn(BATCH, SEQ, HIDDEN, requires_grad=True)
    with MemoryLedger(model, inputs=(x, given)) as ledger:
        hidden = x
        for _ in range(3):
            hidden = checkpoint(run, hidden, use_reentrant=False)
        hidden.sum().backward()
    # The first boundary is the input; two more are kept. What is recomputed is not saved again.
    assert ledger.report().saved_activation_bytes == 2 * x.nbytes
    assert ledger.report().peak_phase == "backward"
    assert ledger.report().composition["activations"] > 2 * x.nbytes


def test_one_step_is_composed_of_what_we_can_count_by_hand():
    model = nn.Linear(100, 50, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    x = torch.randn(8, 100)
    with MemoryLedger(model, optimizer=optimizer, inputs=x) as ledger:
        model(x).sum().backward()
        optimizer.step()
    report = ledger.report()
    weight = 100 * 50 * 4
    assert report.timeline["weights"][-1] == weight
    assert report.timeline["gradients"][-1] == weight
    assert report.timeline["inputs"][-1] == x.nbytes
    # two moments and, on the CPU, a float32 step count
    assert report.timeline["optimizer state"][-1] == 2 * weight + 4
    assert report.live_bytes == 4 * weight + 4 + x.nbytes
    assert report.peak_phase == "optimizer"


def test_every_byte_has_an_owner_and_the_peak_is_the_highest_moment():
    config = block_config("sdpa")
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 64, (BATCH, SEQ))
    with MemoryLedger(model, inputs=ids) as ledger:
        model(input_ids=ids, labels=ids).loss.backward()
    report = ledger.report()
    moments = [sum(at) for at in zip(*report.timeline.values(), strict=True)]
    assert max(moments) == report.peak_bytes == sum(report.composition.values())
    assert len(report.phases) == len(moments)
    assert set(report.composition) == set(CATEGORIES)
    assert sum(b.n_bytes for b in report.largest) == report.peak_bytes
    assert max(report.phase_peaks.values()) == report.peak_bytes
    gradients = sum(p.grad.nbytes for p in model.parameters())
    assert report.timeline["gradients"][-1] == gradients


def test_the_peak_names_its_operation_and_module():
    class Wide(nn.Module):
        def forward(self, x):
            return torch.cat([x] * 50)

    model = nn.Sequential(nn.Linear(4, 4), Wide())
    with MemoryLedger(model) as ledger:
        model(torch.randn(10, 4))
    report = ledger.report()
    assert (report.peak_operation, report.peak_module) == ("cat.default", "1")
    assert report.largest[0].shape == (500, 4)


def test_backward_operations_belong_to_the_module_whose_forward_made_them():
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 2))
    with MemoryLedger(model) as ledger:
        model(torch.arange(4)).sum().backward()
    largest = ledger.report().largest
    made = [b for b in largest if b.category == "gradients" and b.shape == (1000, 8)]
    assert [b.module for b in made] == ["0"]


def test_a_view_costs_nothing_and_a_shared_storage_counts_once():
    with MemoryLedger() as ledger:
        x = torch.zeros(1000)
        views = [x.view(10, 100), x[5:], x.detach()]
    assert ledger.report().peak_bytes == 4000


def test_freed_memory_is_gone():
    with MemoryLedger() as ledger:
        x = torch.zeros(1000)
        del x
        gc.collect()
        y = torch.zeros(500)
    assert ledger.report().peak_bytes == 4000
    assert ledger.live_bytes == 2000


def test_budget_raises_pytorchs_own_error_with_the_numbers():
    message = (
        r"Tried to allocate 3.91 KiB. The budget is 5.00 KiB of which 1.09 KiB is free. "
        r"3.91 KiB is in use, beside the model's modules"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message), MemoryLedger(budget_bytes=5 * 1024):
        keep = [torch.zeros(1000) for _ in range(2)]
    torch.zeros(10)  # and the ledger no longer watches


def test_running_out_leaves_no_hook_behind():
    model = nn.Linear(4, 4)
    with pytest.raises(torch.OutOfMemoryError), MemoryLedger(model, budget_bytes=100):
        model(torch.randn(100, 4)).sum().backward()
    model(torch.randn(100, 4)).sum().backward()
    assert not model.weight._post_accumulate_grad_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("budget", [0, -5, True])
def test_bad_budget(budget):
    with pytest.raises(ValueError, match="budget_bytes must be a positive number"):
        MemoryLedger(budget_bytes=budget)


def test_watching_changes_no_number():
    model = LlamaForCausalLM(block_config("sdpa"))
    ids = torch.randint(0, 64, (BATCH, SEQ))
    model(input_ids=ids, labels=ids).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with MemoryLedger(model):
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_fake_tensors_give_the_same_bytes_as_real_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def peak():
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        with MemoryLedger(model) as ledger:
            model(torch.randn(16, 64)).sum().backward()
        return ledger.report().peak_bytes, ledger.report().composition

    real = peak()
    with FakeTensorMode():
        assert peak() == real


def test_phases_can_be_named():
    with MemoryLedger() as ledger, ledger.phase("load"):
        x = torch.zeros(1000)
    assert ledger.report().phase_peaks == {"load": 4000}


def test_an_aborted_forward_leaves_only_the_weights():
    """What a node saves of its own output must not keep that node alive."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 128))
    weights = sum(p.nbytes for p in model.parameters())
    ledger = MemoryLedger(model, budget_bytes=weights + 4 * 64 * 1024 - 1)
    with ledger, contextlib.suppress(torch.OutOfMemoryError):
        model(torch.ones(256, 64))
        raise AssertionError("the budget was not reached")
    assert ledger.live_bytes == weights


def test_a_ledger_entered_again_counts_as_it_did_the_first_time():
    """Its hooks on gradients go with each use, and come with each."""
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ledger, seen = MemoryLedger(model, optimizer=optimizer), []
    for _ in range(2):
        optimizer.zero_grad()
        with ledger:
            model(torch.ones(4, 64)).sum().backward()
            optimizer.step()
        seen.append({name: live[-1] for name, live in ledger.report().timeline.items()})
    assert seen[0] == seen[1]
    assert seen[1]["gradients"] == sum(p.nbytes for p in model.parameters())
    assert seen[1]["temporaries"] == 0


def test_gradients_and_optimizer_state_made_between_two_uses_are_recognised():
    model = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ledger = MemoryLedger(model, optimizer=optimizer)
    model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    with ledger:
        model(torch.ones(4, 64))
    timeline = ledger.report().timeline
    assert timeline["gradients"][-1] == model.weight.nbytes
    assert timeline["optimizer state"][-1] == 2 * model.weight.nbytes + 4
    assert timeline["inputs"][-1] == 0


def test_an_error_in_the_optimizer_does_not_name_the_next_phases():
    model = nn.Linear(8, 8)

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("planted")

    ledger = MemoryLedger(model)
    with contextlib.suppress(RuntimeError), ledger:
        model(torch.ones(4, 8)).sum().backward()
        Broken(model.parameters(), lr=1.0).step()
    with ledger:
        model(torch.ones(4, 8))
    assert ledger.phase_now() == "forward" and "optimizer" not in ledger.report().phase_peaks


def test_a_model_is_not_kept_alive_by_the_ledger_that_watches_it():
    model = nn.Linear(64, 64)
    ledger = MemoryLedger(model)
    with ledger:
        model(torch.ones(4, 64)).sum().backward()
    del model
    gc.collect()
    assert ledger.live_bytes == 0
    with ledger:  # and it can be used again
        torch.zeros(4)


def test_a_device_ledgers_stream_can_be_asked_for_twice():
    from fitcast.forecasting.fake import fake_tensors
    from fitcast.memory.stream import DeviceLedger, Work

    ledger = DeviceLedger()
    with fake_tensors():
        x = torch.empty(16)
        with ledger:
            y = x + 1
            ledger.mark("made")
            ledger.work.append(Work(1, 1, 0, 0.0))
        once, again = ledger.stream(), ledger.stream()
        del y  # and what is freed afterwards is not in a stream that was handed out
    assert once == again and len(once.events) == 2 and once.marks == {"made": 2}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with the CUDA allocator")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_cuda_the_peak_is_max_memory_allocated_up_to_cublas_workspaces(checkpointing):
    from fitcast import gpus
    from fitcast.step import qlora

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_hidden_layers=4,
        vocab_size=32000,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).cuda()
    qlora.checkpoint_layers(model, 4 if checkpointing else 0)
    ids = torch.randint(0, 32000, (2, 512), device="cuda")

    def requested(which):  # bytes asked for, before the allocator rounds
        return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]

    for _ in range(2):  # the first step also makes the workspaces
        gpus.reset_peak()
        before = requested("current")
        with MemoryLedger(model, inputs=ids) as ledger:
            workspaces = before - ledger.live_bytes
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
    assert workspaces in (gpus.detect().workspace_bytes * n for n in (1, 2))
    assert requested("peak") - workspaces == peak_with_softmax_backward(ledger)


def peak_with_softmax_backward(ledger):
    """The ledger's peak, if softmax backward holds a second tensor of its result's size.

    That one lives and dies inside the CUDA kernel, so it lifts that moment alone.
    """
    report = ledger.report()
    lifted = [
        sum(live[event + 1] for live in report.timeline.values()) + ledger._blocks[block].n_bytes
        for event, (sign, block, _) in enumerate(ledger._events)
        if sign > 0 and ledger._blocks[block].operation.startswith("_softmax_backward_data")
    ]
    return max([report.peak_bytes, *lifted])
