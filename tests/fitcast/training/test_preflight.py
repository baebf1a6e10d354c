"""Preflight: every obstacle is found before the run, with its fix."""

import dataclasses
import os
import re
import shutil
from importlib import metadata
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from course_utils.data import BUNDLED
from fitcast import gpus, models
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import host, preflight
from fitcast.training.versions import FLOORS
from fitcast.units import GIB, show_bytes
from tools.notebooks import ROOT

ONE_B = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16")


def found(recipe, gpu, name, **options):
    table = preflight.preflight(recipe, gpu, **options)
    return next(finding for finding in table.findings if finding.name == name)


def test_the_bundled_model_may_train_anywhere(tmp_path):
    table = preflight.preflight(TrainRecipe(model=BUNDLED), None, tmp_path)
    assert table.require() is table
    assert all(line.startswith("ok") for line in repr(table).splitlines())


@pytest.fixture
def checkpoint(tmp_path):
    """The bundled model as a checkpoint of several files."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    model.save_pretrained(tmp_path / "model", max_shard_size="1MB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


FAULTS = {
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        "no model.safetensors",
    ),
    "one file missing": (
        lambda folder: next(folder.glob("model-00002*")).unlink(),
        "no model-00002-of-0000",
    ),
    "a copy that broke off": (
        lambda folder: halve(next(folder.glob("model-00002*"))),
        "model-00002-of-.*is not whole",
    ),
    "a damaged list": (
        lambda folder: halve(folder / "model.safetensors.index.json"),
        "model.safetensors.index.json is damaged",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json that"),
    "a damaged config": (lambda folder: halve(folder / "config.json"), "no config.json that"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_does_not_load_is_stopped(checkpoint, fault):
    recipe = TrainRecipe(model=str(checkpoint))
    assert found(recipe, None, "weights").fix is None
    damage, words = FAULTS[fault]
    damage(checkpoint)
    weights = found(recipe, None, "weights")
    assert re.match(words, weights.found) and "save_pretrained" in weights.fix
    with pytest.raises(ValueError, match="weights must let the run pass, got"):
        preflight.preflight(recipe, None).require()
    with pytest.raises((OSError, ValueError, SafetensorError)):
        qlora.load_base(recipe)


def test_a_config_alone_is_neither_weights_nor_a_small_model(tmp_path):
    models.config("llama-3.1-8b").save_pretrained(tmp_path / "llama-8b")
    recipe = TrainRecipe(model=str(tmp_path / "llama-8b"))
    stops = [f for f in preflight.preflight(recipe, None).findings if f.fix]
    assert [finding.name for finding in stops] == ["GPU", "weights"]
    file = TrainRecipe(model=str(tmp_path / "llama-8b" / "config.json"))
    assert found(file, None, "weights").found.startswith("no model.safetensors in")


def test_a_large_model_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="switch Runtime > Change runtime type to T4"):
        preflight.preflight(ONE_B, None).require()


def test_bfloat16_on_a_t4_is_refused():
    finding = found(TrainRecipe(model=BUNDLED, amp_dtype="bfloat16"), gpus.T4, "precision")
    assert "amp_dtype must be 'float16' on a T4" in finding.found
    assert finding.fix == "use recipe.for_gpu(gpus.detect())"
    assert found(TrainRecipe(model=BUNDLED, amp_dtype="bfloat16"), gpus.L4, "precision").fix is None
    assert found(ONE_B, None, "precision").fix


def planned(peak, fits=True):
    return SimpleNamespace(peak_allocated_bytes=peak, peak_reserved_bytes=(peak, peak), fits=fits)


def test_memory_is_held_against_what_is_free(monkeypatch):
    assert found(ONE_B, gpus.T4, "memory", planned=planned(14 * GIB)).fix is None
    assert (
        "halve micro_batch_size" in found(ONE_B, gpus.T4, "memory", planned=planned(15 * GIB)).fix
    )
    assert found(ONE_B, gpus.T4, "memory", planned=planned(14 * GIB, fits=False)).fix
    monkeypatch.setattr(gpus, "free_bytes", lambda: 10 * GIB)  # another program is there
    assert found(ONE_B, gpus.T4, "memory", planned=planned(14 * GIB)).fix


def test_disk_must_take_the_download(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * GIB))
    finding = found(ONE_B, gpus.T4, "disk", output_dir=tmp_path / "not/there/yet")
    assert "2.00 GiB free" in finding.found and "another output_dir" in finding.fix
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
    assert found(ONE_B, gpus.T4, "disk").fix is None  # 1.24e9 parameters in 16 bits: 2.3 GiB


def test_disk_must_take_whole_models_when_all_weights_are_trained():
    full = TrainRecipe(model=BUNDLED, lora_rank=None, base="float32")
    needed = found(full, None, "disk").found.split(" needed")[0]
    n_parameters = 1_525_440  # of the bundled model
    assert needed == show_bytes(3 * 12 * n_parameters)


@pytest.mark.parametrize(("rank", "targets"), [(64, "all-linear"), (1, ("q_proj", "v_proj"))])
def test_disk_must_take_the_adapters_and_their_averages(monkeypatch, rank, targets):
    recipe = TrainRecipe(model=BUNDLED, lora_rank=rank, lora_targets=targets)
    chance = torch.get_rng_state()
    needed = found(recipe, None, "disk").found.split(" needed")[0]
    assert torch.equal(torch.get_rng_state(), chance), "a look must not change what is trained"
    model = AutoModelForCausalLM.from_config(models.config(recipe.model))
    sizes = [
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name != "lm_head"
        and (targets == "all-linear" or name.endswith(targets))
    ]
    assert len(sizes) == model.config.num_hidden_layers * (7 if rank == 64 else 2)
    assert needed == show_bytes(3 * 12 * rank * sum(sizes))


def test_versions_are_those_of_requirements(monkeypatch):
    text = (ROOT / "requirements.txt").read_text("utf-8")
    for name, floor in FLOORS.items():
        assert re.search(rf"^{name}>={floor[0]}\.{floor[1]}\s", text, re.MULTILINE), name
    monkeypatch.setattr(metadata, "version", lambda name: {"peft": "0.9.1"}.get(name, "99.0"))
    finding = found(TrainRecipe(model=BUNDLED), None, "versions")
    assert finding.found == "peft 0.9.1 (needed: 0.20)" and "run the set-up cell" in finding.fix


def hub(monkeypatch, error: Exception | None, cached: str | None = None):
    """A hub that answers with an error, or with nothing to complain about."""

    def auth_check(source, repo_type):
        if error is not None:
            raise error

    def snapshot_download(source, repo_type, local_files_only):
        assert local_files_only, "nothing may be downloaded here"
        if cached is None:
            raise LocalEntryNotFoundError("no")
        return cached

    monkeypatch.setattr(huggingface_hub, "auth_check", auth_check)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def refusal(kind: type, status: int) -> Exception:
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=status))


NETWORK_DOWN = HfHubHTTPError.__bases__[0]("no route")  # the HTTP library's own error
ANSWERS = [
    (None, "open", None),
    (refusal(GatedRepoError, 403), "gated", "accept its licence"),
    (refusal(RepositoryNotFoundError, 404), "unknown", "check the spelling"),
    (refusal(HfHubHTTPError, 503), "silent", "check the network"),
    (OfflineModeIsEnabled("no"), "silent", "check the network"),
    (NETWORK_DOWN, "silent", "check the network"),
]


@pytest.mark.parametrize(("error", "answer", "words"), ANSWERS, ids=lambda value: str(value)[:12])
def test_weights_are_on_the_hub_and_open(monkeypatch, error, answer, words):
    hub(monkeypatch, error)
    assert preflight.ask_hub("unsloth/Llama-3.2-1B-Instruct") == answer
    fix = found(ONE_B, gpus.T4, "weights").fix
    assert fix is None if words is None else words in fix


@pytest.mark.parametrize(("error", "answer", "words"), ANSWERS[1:4], ids=["gated", "?", "silent"])
def test_a_model_that_the_hub_withholds_is_a_finding(monkeypatch, error, answer, words):
    def config(model):
        raise ValueError("a config that is on the hub alone is not to be had, either")

    hub(monkeypatch, error)
    monkeypatch.setattr(models, "config", config)
    table = preflight.preflight(TrainRecipe(model="some/model"), gpus.T4)
    assert [finding.name for finding in table.findings if finding.fix] == ["weights"]
    assert words in table.findings[-1].fix
    assert "the model's size is not known" in repr(table)


def test_a_name_that_no_model_can_have_is_unknown():
    assert preflight.ask_hub("foo/bar baz") == "unknown"  # refused before any request


def test_weights_that_are_here_need_no_hub(monkeypatch, tmp_path):
    hub(monkeypatch, NETWORK_DOWN, cached=str(tmp_path))
    assert preflight.ask_hub("a/b") == "silent", "a snapshot without weights is no model"
    (tmp_path / "model.safetensors").touch()
    assert preflight.ask_hub("a/b") == "silent", "the download broke off"
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert preflight.ask_hub("a/b") == "cached"
    assert found(ONE_B, gpus.T4, "weights").fix is None


def test_every_stop_is_in_the_message():
    with pytest.raises(ValueError) as caught:
        preflight.preflight(
            TrainRecipe(model=BUNDLED, amp_dtype="bfloat16"), gpus.T4, planned=planned(20 * GIB)
        ).require()
    assert len(str(caught.value).splitlines()) == 2


def test_a_family_that_overflows_float16_is_stopped_on_a_t4(tmp_path):
    """Gemma 3 has no preset; its config alone tells its family."""
    from transformers import Gemma3TextConfig

    Gemma3TextConfig(num_hidden_layers=1, vocab_size=512).save_pretrained(tmp_path)
    recipe = TrainRecipe(model=str(tmp_path), amp_dtype="float16", lora_targets="all-linear")
    precision = found(recipe, gpus.T4, "precision")
    assert "Gemma 3 is not safe in float16: activations reach about 800 000" in precision.found
    assert "train in float32 or take another card" in precision.fix
    assert found(ONE_B, gpus.T4, "precision").fix is None
    in_float32 = TrainRecipe(model=str(tmp_path), amp_dtype=None, lora_targets="all-linear")
    assert found(in_float32, gpus.T4, "precision").fix is None


def test_what_merging_will_lack_is_said_and_stops_nothing(monkeypatch):
    """Llama-3.1-8B has 8 030 261 248 parameters: 14.96 GiB in 16 bits."""
    recipe = TrainRecipe(model="llama-3.1-8b", amp_dtype="float16")
    monkeypatch.setattr(host, "memory", lambda: (13 * GIB, 12 * GIB))
    disk = SimpleNamespace(free=100 * GIB, total=200 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    merge = found(recipe, gpus.T4, "merge")
    assert merge.found.startswith("14.96 GiB of host memory and of disk") and merge.fix is None
    assert "now free: 12.00 GiB of memory, so keep the adapters" in merge.found
    monkeypatch.setattr(host, "memory", lambda: (64 * GIB, 60 * GIB))
    assert "merge" not in [finding.name for finding in preflight.preflight(recipe, None).findings]
    monkeypatch.setattr(host, "memory", lambda: (GIB, GIB))
    whole = TrainRecipe(model="llama-3.2-1b", base="float32", lora_rank=None, amp_dtype=None)
    assert "merge" not in [finding.name for finding in preflight.preflight(whole, None).findings]


def test_host_memory_is_what_the_system_says():
    """Against the C library's own answer."""
    total, free = host.memory()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free <= total <= pages


@pytest.mark.one_fast
@pytest.mark.parametrize(
    "free_gib, words",
    [(6, "GiB free"), (3, "cpu_ram_efficient_loading rank 0 alone"), (1, "one tensor at a time")],
)
def test_two_ranks_that_load_need_two_copies(monkeypatch, free_gib, words):
    """llama-3.2-1b in 16 bits is 2.30 GiB on the hub, so two copies are 4.60."""
    monkeypatch.setattr(host, "memory", lambda: (16 * GIB, free_gib * GIB))
    many = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16", world_size=2)
    copies = found(many, gpus.T4, "host copies")
    assert copies.found.startswith("2 ranks that each load the model take 4.60 GiB")
    assert words in copies.found and copies.fix is None
    alone = preflight.preflight(ONE_B, gpus.T4).findings
    assert "host copies" not in [finding.name for finding in alone]


def test_a_card_without_kernels_is_no_green_line(tmp_path, monkeypatch):
    """Reported: a P100 was "ok" under a PyTorch that starts at sm_70; doctor had said no."""
    monkeypatch.setattr(gpus, "compiled_for", lambda: ("sm_70", "sm_90"))
    old = dataclasses.replace(gpus.T4, name="P100", capability=(6, 0))
    assert "none for sm_60" in preflight._gpu(old, None).fix
    assert preflight._gpu(gpus.T4, None).fix is None
