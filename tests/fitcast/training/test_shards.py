"""Merged by shards: the numbers of a merge in memory, within little memory."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fitcast.step import qlora
from fitcast.training import export, random_weights, shards, trainer
from tests.tiny import tiny_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe, and the folder of an adapter with random (not zero) numbers."""
    folder = tmp_path_factory.mktemp("shards")
    recipe = tiny_recipe(folder / "model", lora_targets=("q_proj", "v_proj", "down_proj"))
    model = trainer.build_model(recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    export.save_adapter(model, folder / "adapter")
    return recipe, folder / "adapter"


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_every_weight_is_that_of_a_merge_in_memory(trained, tmp_path, base):
    recipe, adapter = trained
    size = shards.merge_shards(recipe, adapter, tmp_path / "merged", base, shard_bytes=40_000)
    files = sorted(tmp_path.glob("merged/*.safetensors"))
    assert len(files) > 2 and size == sum(path.stat().st_size for path in files)
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.dtype == torch.float16 and merged.config.use_cache
    expected = dict(export.merge(recipe, adapter, base).named_parameters())
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, expected[name].half()), name
    assert not torch.equal(
        merged.model.layers[0].self_attn.q_proj.weight,
        dict(qlora.load_base(dataclasses.replace(recipe, base="float32")).named_parameters())[
            "model.layers.0.self_attn.q_proj.weight"
        ].half(),
    )


@pytest.fixture
def doubled(trained, tmp_path):
    """The same adapter, with twice the numbers."""
    folder = tmp_path / "doubled"
    shutil.copytree(trained[1], folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(path).items()}, path)
    return folder


def first_weight(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.model.layers[0].self_attn.q_proj.weight


@pytest.mark.parametrize(("before", "after"), [(10**9, 20_000), (20_000, 10**9), (20_000, 40_000)])
def test_an_older_model_in_the_folder_gives_way(trained, doubled, tmp_path, before, after):
    """transformers reads model.safetensors before an index, and an index before that."""
    recipe, adapter = trained
    for learned, folder, size in (
        (adapter, "merged", before), (doubled, "merged", after), (doubled, "alone", after)
    ):  # fmt: skip
        shards.merge_shards(recipe, learned, tmp_path / folder, "original", shard_bytes=size)
    assert torch.equal(first_weight(tmp_path / "merged"), first_weight(tmp_path / "alone"))
    assert not list(tmp_path.glob("merged/part-*"))


def test_a_kill_leaves_the_old_model_or_none_but_no_mixture(
    trained, doubled, tmp_path, monkeypatch
):
    recipe, adapter = trained
    merged = tmp_path / "merged"
    shards.merge_shards(recipe, adapter, merged, "original", shard_bytes=20_000)
    whole, done = shards.Path.replace, []

    def killed(path, target):
        done.append(path)
        if len(done) > 2:
            raise KeyboardInterrupt
        return whole(path, target)

    monkeypatch.setattr(shards.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        shards.merge_shards(recipe, doubled, merged, "original", shard_bytes=20_000)
    with pytest.raises(OSError):
        first_weight(merged)
    monkeypatch.undo()
    shards.merge_shards(recipe, doubled, merged, "original", shard_bytes=20_000)
    assert first_weight(merged) is not None


def test_the_bases_own_folder_is_refused(trained):
    recipe, adapter = trained
    with pytest.raises(ValueError, match="^folder must be another one than the base's"):
        shards.merge_shards(recipe, adapter, recipe.model, "original")


def test_what_it_cannot_merge_is_refused(trained, tmp_path):
    recipe, adapter = trained
    changed = tmp_path / "adapter"
    changed.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def merge(config=config, names=str):
        from safetensors.torch import save_file

        (changed / "adapter_config.json").write_text(json.dumps(config))
        save_file(
            {names(name): tensor for name, tensor in weights.items()},
            changed / "adapter_model.safetensors",
        )
        shards.merge_shards(recipe, changed, tmp_path / "merged", "original")

    with pytest.raises(ValueError, match="must be plain LoRA, got use_dora"):
        merge(config | {"use_dora": True})
    with pytest.raises(ValueError, match="must belong to weights in the base's files, got none fo"):
        merge(names=lambda name: name.replace("q_proj", "qkv"))
    with pytest.raises(ValueError, match="must hold LoRA's matrices only, got .*embed"):
        merge(names=lambda name: name.replace("q_proj.lora_A", "embed"))
    with pytest.raises(ValueError, match="be 'original' for a recipe in float32"):
        plain = dataclasses.replace(recipe, base="float32")
        shards.merge_shards(plain, adapter, tmp_path / "merged")


PEAK = """
import resource, sys
import bitsandbytes.functional  # what is imported takes memory, too
from fitcast import TrainRecipe
from fitcast.training import shards
recipe = TrainRecipe(model=sys.argv[1], amp_dtype="float16")
shards.merge_shards(recipe, sys.argv[2], sys.argv[3], sys.argv[4], shard_bytes=int(sys.argv[5]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_bytes(model, adapter, target, base, shard_bytes):
    """Peak resident memory of a process that merges."""
    said = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, (model, adapter, target, base, shard_bytes))],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    return int(said.stdout.split()[-1])


def random_adapter(model, folder):
    """An adapter of rank 16 on every query and value projection of a model in a folder."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    config, tensors = LlamaConfig.from_pretrained(model), {}
    widths = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for target, heads in widths.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(16, config.hidden_size) / 100
            tensors[f"{name}.lora_B.weight"] = torch.randn(heads * config.head_dim, 16) / 100
    LoraConfig(r=16, lora_alpha=32, target_modules=list(widths)).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_the_peak_is_a_file_and_not_the_model(trained, tmp_path, base):
    """A model of 1.3 GiB in one file: beyond what the imports take, a part of it."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=10,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    model = random_weights.write(str(tmp_path / "config"), tmp_path)
    assert (model / "model.safetensors").stat().st_size > 1.1 * 2**30
    (tmp_path / "adapter").mkdir()
    random_adapter(model, tmp_path / "adapter")
    small, adapter = trained
    nothing = peak_bytes(small.model, adapter, tmp_path / "small", base, 2**20)
    peak = peak_bytes(model, tmp_path / "adapter", tmp_path / "out", base, 2**27)
    assert peak - nothing < 0.5 * 2**30
