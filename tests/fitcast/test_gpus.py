import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fitcast import gpus
from fitcast.gpus import PRESETS, T4, Gpu, mixed_precision
from fitcast.units import MIB


def test_t4_sees_14_56_gib():
    assert T4.total_bytes == 14912 * MIB
    assert T4.usable_bytes == (14912 - 141) * MIB


def test_workspace_is_pytorchs_default_string():
    # :4096:2:16:8 means 2 buffers of 4096 KiB and 8 of 16 KiB; Hopper gets 8 of 4096 KiB
    assert T4.workspace_bytes == 8_519_680
    assert gpus.H100.workspace_bytes == 32 * MIB


@pytest.mark.parametrize("name", ["T4", "t4", "a100-40"])
def test_preset_ignores_case(name):
    assert gpus.preset(name).name.lower() == name.lower()


def test_bfloat16_needs_capability_8():
    assert {gpu.name for gpu in PRESETS.values() if not gpu.has_bfloat16} == {
        "T4", "P100", "V100-16", "V100-32",
    }  # fmt: skip
    assert mixed_precision(T4).dtype == "float16"
    assert "7.5" in mixed_precision(T4).reason
    assert mixed_precision(gpus.L4).dtype == "bfloat16"
    assert mixed_precision(None).dtype is None


WRONG = [
    ("total_bytes", 0),
    ("total_bytes", -1),
    ("total_bytes", "16 GB"),
    ("total_bytes", 14.5),
    ("context_bytes", 0),
    ("context_bytes", 10**12),
    ("multiprocessors", 2.5),
    ("name", ""),
    ("capability", 7.5),
    ("capability", (7,)),
    ("capability", (7, -5)),
    ("capability", (True, 5)),
    ("matmul_flops", 0),
    ("float32_flops", float("nan")),
    ("bandwidth", True),
    ("bandwidth", float("inf")),
    ("flash_attention", "no"),
    ("sustained", 0.6),
    ("sustained", (0.6, 0.3)),
    ("sustained", (0.3, 1.1)),
    ("basis", ""),
]


def test_every_field_is_refused_when_wrong():
    assert {field for field, _ in WRONG} == {field.name for field in dataclasses.fields(T4)}


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_bad_gpu_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"^{field} must .*got .*; "):
        dataclasses.replace(T4, **{field: value})


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="gpu must be one of T4, .*got 'T5'"):
        gpus.preset("T5")


def test_a_misspelt_variable_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(gpus.EMULATE_VARIABLE, "T5")
    with pytest.raises(ValueError, match="^COURSE_EMULATE_GPU must be one of T4, .*got 'T5'"):
        gpus.detect()


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    """CUDA's own counters answer 0 on a CPU; ours must not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpus.detect() is None and gpus.device() == "cpu"
    gpus.use_expandable_segments(True)
    gpus.synchronize()
    measures = gpus.reset_peak, gpus.peak_reserved_bytes, gpus.free_bytes
    assert [measure() for measure in measures] == [None] * 3
    assert gpus.peak_allocated_bytes(above=None) is None
    with pytest.raises(ValueError, match="needs a CUDA device"), gpus.emulate(T4):
        pass
    assert "14.56 GiB" in gpus.describe(None)


@pytest.mark.parametrize(
    ("name", "capability", "nearest"),
    [
        ("Tesla T4", (7, 5), T4),
        ("NVIDIA L4", (8, 9), gpus.L4),
        ("NVIDIA A100-SXM4-40GB", (8, 0), gpus.A100),
        ("NVIDIA A10G", (8, 6), gpus.A10),
        ("NVIDIA H100 80GB HBM3", (9, 0), gpus.H100),
        ("NVIDIA B200", (10, 0), gpus.B200),
        ("NVIDIA GeForce RTX 4090", (8, 9), gpus.RTX_4090),
        ("NVIDIA GeForce RTX 3060", (8, 6), gpus.RTX_3060_12),
        ("Tesla V100-SXM2-32GB", (7, 0), gpus.V100_32),
        ("NVIDIA A100-SXM4-80GB", (8, 0), gpus.A100_80),
        ("NVIDIA GB300", (10, 3), gpus.B200),
    ],
)
def test_card_is_known_by_name_or_by_its_kernels(monkeypatch, name, capability, nearest):
    card = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=nearest.total_bytes,
        multi_processor_count=99,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.delenv(gpus.EMULATE_VARIABLE, raising=False)
    found = gpus.detect()
    assert (found.matmul_flops, found.bandwidth) == (nearest.matmul_flops, nearest.bandwidth)
    assert found == nearest or (found.name, found.capability) == (name, capability)
    assert found == nearest or found.multiprocessors == 99


@pytest.mark.parametrize(
    ("name", "total_mib"), [("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9984), ("NVIDIA H100 NVL", 95320)]
)
def test_a_slice_or_a_larger_sister_keeps_its_own_memory(monkeypatch, name, total_mib):
    card = SimpleNamespace(
        name=name, major=9, minor=0, total_memory=total_mib * MIB, multi_processor_count=16
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.delenv(gpus.EMULATE_VARIABLE, raising=False)
    found = gpus.detect()
    assert (found.name, found.total_bytes) == (name, total_mib * MIB)
    assert found.bandwidth == gpus.H100.bandwidth


def test_gpu_is_a_value():
    assert Gpu(**dataclasses.asdict(T4)) == T4
    assert hash(T4) == hash(dataclasses.replace(T4))


def test_a_preset_is_found_as_people_write_it():
    assert gpus.preset("rtx 4090") == gpus.preset("RTX4090") == gpus.RTX_4090
    assert gpus.preset("l40s") == gpus.L40S
    with pytest.raises(ValueError, match="one card, got 'A100'; say A100-40 or A100-80"):
        gpus.preset("A100")


def test_a_card_of_its_own_takes_the_nearest_kernels_and_measured_nothing():
    card = gpus.custom(48 * 2**30, (8, 6))
    assert (card.total_bytes, card.capability) == (48 * 2**30, (8, 6))
    assert card.matmul_flops == gpus.RTX_3090.matmul_flops  # of 8.6, and nearest in memory
    assert card.basis.startswith("not measured") and "8.6" in card.name


def test_rates_say_whether_they_were_measured():
    measured = {gpu.name for gpu in PRESETS.values() if not gpu.basis.startswith("not measured")}
    assert measured == {"T4", "H200"}
    low, high = (part * T4.matmul_flops / 1e12 for part in T4.sustained)
    assert (round(low), round(high)) == (15, 24)  # facts: public readings of a T4
