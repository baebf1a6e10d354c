"""The doctor: every card against this PyTorch's kernels, the hub, what is missing or too old."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fitcast import gpus
from fitcast.cli import doctor
from fitcast.cli import main as cli
from fitcast.training import host
from fitcast.units import GIB

ASK = "from fitcast.cli.doctor import _hub; print(_hub().found)"
# What PyTorch 2.11.0 for CUDA 13.0 says of itself on an H200.
TODAY = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def machine(monkeypatch, compiled, *cards, nccl=True):
    """A machine with these (name, (major, minor), total GiB, free GiB); `None` does not answer."""

    def properties(index):
        name, (major, minor), total, _ = cards[index]
        return SimpleNamespace(
            name=name,
            major=major,
            minor=minor,
            total_memory=total * GIB,
            multi_processor_count=56,
        )

    def memory(index=0):
        _, _, total, free = cards[index]
        if free is None:
            raise RuntimeError("CUDA error: out of memory")
        return free * GIB, total * GIB

    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: compiled)
    monkeypatch.delenv(gpus.EMULATE_VARIABLE, raising=False)
    return {finding.name: finding for finding in doctor.doctor()}


def test_a_card_without_kernels_is_not_green(monkeypatch):
    """A P100 (6.0) under a PyTorch whose oldest kernels are for 7.5: no operation would run."""
    found = machine(monkeypatch, TODAY, ("Tesla P100-PCIE-16GB", (6, 0), 16, 15))
    card = found["GPU 0"]
    assert card.found.startswith("Tesla P100-PCIE-16GB, compute capability 6.0, 16.00 GiB")
    assert "none for sm_60" in card.fix and "sm_75" in card.fix and "previous-versions" in card.fix


def test_every_card_is_looked_at(monkeypatch, capsys):
    cards = [
        ("NVIDIA A100-SXM4-40GB", (8, 0), 40, 39),
        ("Tesla T4", (7, 5), 16, 2),
        ("Tesla K80", (3, 7), 12, 12),
        ("NVIDIA H200", (9, 0), 140, None),
    ]
    found = machine(monkeypatch, TODAY, *cards)
    assert [name for name in found if name.startswith("GPU")] == [
        "GPU 0",
        "GPU 1",
        "GPU 2",
        "GPU 3",
    ]
    assert found["GPU 0"].fix is None and "39.00 GiB free" in found["GPU 0"].found
    assert "holds most of it" in found["GPU 1"].fix
    assert "none for sm_37" in found["GPU 2"].fix and "hide GPU 2" in found["GPU 2"].fix
    assert "does not answer" in found["GPU 3"].fix and "memory unknown" in found["GPU 3"].found
    assert cli.main(["doctor", "--json"]) == 3
    (t4,) = [row for row in json.loads(capsys.readouterr().out) if row["name"] == "GPU 1"]
    assert (t4["total_bytes"], t4["free_bytes"]) == (16 * GIB, 2 * GIB)


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((8, 6), ["sm_80"], True),  # machine code: later minor versions of the same major
        ((8, 0), ["sm_86"], False),  # and no earlier ones
        ((7, 5), ["sm_70"], True),
        ((7, 0), ["sm_75"], False),
        ((9, 0), ["sm_80", "sm_86"], False),  # and no other major
        ((9, 0), ["sm_80", "compute_80"], True),  # PTX: every later card
        ((7, 5), ["compute_80"], False),
        ((9, 0), ["sm_90a"], True),  # bound to one architecture
        ((9, 1), ["sm_90a"], False),
        ((10, 0), ["compute_90a"], False),
        ((10, 3), ["sm_100f"], True),  # bound to its family
        ((12, 0), ["sm_100f"], False),
        ((12, 0), ["compute_100f"], False),
        ((12, 0), ["sm_120"], True),  # the last digit is the minor version
        ((1, 2), ["sm_120"], False),
        ((9, 4), ["gfx942"], True),  # a PyTorch for AMD: nothing to compare
        ((7, 5), [], True),
    ],
)
def test_kernels_run_where_nvidias_guide_says(capability, compiled, runs):
    assert gpus.has_kernels(capability, compiled) is runs


def test_kernels_run_where_pytorch_itself_says():
    """Its own table, cards on Jetson boards aside: those run no code of their desktop sisters."""
    table = getattr(torch.cuda, "DEVICE_REQUIREMENT", None)
    if table is None:
        pytest.skip("this PyTorch has no such table")
    jetson = {53, 62, 72, 87, 101, 110}
    desktop = sorted(set(table) - jetson)
    assert len(desktop) > 10
    for card in desktop:
        for built in desktop:
            ours = gpus.has_kernels(divmod(card, 10), [f"sm_{built}"])
            assert ours is (card in table[built]), (card, built)


def test_an_emulated_card_is_named_beside_the_real_one(monkeypatch):
    machine(monkeypatch, TODAY, ("NVIDIA H200", (9, 0), 140, 139))
    monkeypatch.setattr(gpus, "_emulated", gpus.T4)
    monkeypatch.setenv(gpus.EMULATE_VARIABLE, "T4")
    found = {finding.name: finding for finding in doctor.doctor()}
    assert "NVIDIA H200" in found["GPU 0"].found
    assert found["emulated"].found == "T4, by COURSE_EMULATE_GPU"
    assert found["precision"].found.startswith("float16 (T4 has")


@pytest.mark.parametrize("hidden", [False, True])
def test_a_card_that_pytorch_does_not_see_is_a_fault(monkeypatch, tmp_path, hidden):
    """PyTorch for CPUs, or one too new for the driver, beside a GPU: nothing would run on it."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:  # on purpose
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    card = machine(monkeypatch, [])["GPU"]
    assert card.found.startswith("none: ")
    assert card.fix is None if hidden else "does not see nvidia0, nvidia1 of" in card.fix


def test_doctor_tells_of_this_machine(capsys, monkeypatch):
    assert cli.main(["doctor", "--json"]) == 0
    told = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert told["python"]["found"].startswith(".".join(map(str, sys.version_info[:2])))
    assert all(finding["fix"] is None for finding in told.values())
    monkeypatch.setitem(doctor.FLOORS, "peft", (99, 0))
    assert cli.main(["doctor"]) == 3
    assert "-> pip install 'peft>=99.0'" in capsys.readouterr().out


def test_a_release_candidate_is_older_than_its_release(monkeypatch):
    """pip would not take it for the floor, and nothing here was run on it."""
    known = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: "5.15rc1" if name == "transformers" else known(name)
    )
    found = {finding.name: finding for finding in doctor.doctor()}
    assert "pip install 'transformers>=5.15'" in found["transformers"].fix


def test_doctor_needs_none_of_what_it_looks_for():
    code = """
import sys
from importlib import metadata
version, missing = metadata.version, {"torch", "transformers", "peft", "bitsandbytes"}
sys.modules.update(dict.fromkeys(missing))  # None makes an import of it fail

def asked(name):
    if name in missing:
        raise metadata.PackageNotFoundError(name)
    return version(name)

metadata.version = asked
from fitcast.cli.main import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("not installed\n") == 4 and "pip install 'torch>=2.11'" in done.stdout


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("HF_HUB_OFFLINE", "1", "switched off by"),
        ("HF_HUB_OFFLINE", "false", "allowed (not asked)"),
        ("TRANSFORMERS_OFFLINE", "1", "switched off by"),
        ("TRANSFORMERS_OFFLINE", "0", "allowed (not asked)"),
    ],
)
def test_the_hub_is_off_when_the_library_says_so(monkeypatch, variable, value, words):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(words)


def test_the_doctor_does_without_the_hubs_library(monkeypatch):
    known = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: None if name == "huggingface_hub" else known(name)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "hub" not in [finding.name for finding in doctor.doctor()]


T4X2 = [("Tesla T4", (7, 5), 15, 14), ("Tesla T4", (7, 5), 15, 14)]


def test_two_t4s_are_both_named_and_what_runs_on_them(monkeypatch):
    """As on Kaggle: one process of Trainer takes both, and neither has bfloat16."""
    found = machine(monkeypatch, TODAY, *T4X2)
    assert [found[name].found.split(",")[0] for name in ("GPU 0", "GPU 1")] == ["Tesla T4"] * 2
    assert "): one process of Trainer counts all" in found["several GPUs"].found
    assert "torchrun --nproc_per_node 2" in found["several GPUs"].found
    assert all(finding.fix is None for finding in found.values())
    overflowing = found["float16"].found
    assert overflowing.count("Gemma 3,") == 1 and "gpt-oss" in overflowing


@pytest.mark.parametrize("nccl", [True, False])
def test_two_cards_are_named_with_nccl_and_the_trap(monkeypatch, nccl):
    cards = ("Tesla T4", (7, 5), 15, 14), ("Tesla P4", (7, 5), 8, 7)
    found = machine(monkeypatch, TODAY, *cards, nccl=nccl)
    said = found["several GPUs"].found
    assert said.startswith("2 (Tesla T4, Tesla P4)") and "2 times the batch" in said
    assert "a 4-bit model takes it all on one card; TRL's trainers refuse" in said
    assert (found["NCCL"].fix is None) == nccl


def test_a_launcher_springs_the_trap(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    card = ("Tesla T4", (7, 5), 15, 14)
    said = machine(monkeypatch, TODAY, card, card)["several GPUs"].found
    assert "as it was launched" in said and "DataParallel" not in said


def test_one_card_with_bfloat16_has_neither_remark(monkeypatch):
    found = machine(monkeypatch, TODAY, ("NVIDIA H200", (9, 0), 140, 139))
    assert not {"several GPUs", "float16", "NCCL"} & set(found)


def test_host_memory_is_said_as_what_can_be_merged(monkeypatch):
    """Colab's 12.7 GiB do not hold an 8B model in 16 bits; 8.03 billion take 14.96 GiB."""
    monkeypatch.setattr(host, "memory", lambda: (13 * GIB, int(12.7 * GIB)))
    found = machine(monkeypatch, [])["host memory"]
    assert "12.70 GiB free of 13.00 GiB" in found.found and "6.8 billion" in found.found
    assert (found.total_bytes, found.fix) == (13 * GIB, None)
    monkeypatch.setattr(host, "memory", lambda: (None, None))
    assert "not known" in machine(monkeypatch, [])["host memory"].found
