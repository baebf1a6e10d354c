import json
from pathlib import Path

import pytest
import torch

from course_utils.data import BUNDLED
from fitcast import models


def _parameters(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(
            p.numel() for p in AutoModelForCausalLM.from_config(models.config(name)).parameters()
        )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # as counted from the published checkpoints (model cards' safetensors totals)
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-2-7b", 6_738_415_616),
        ("phi-4-mini", 3_836_021_760),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("smollm2-1.7b", 1_711_376_384),
    ],
)
def test_shape_has_the_published_number_of_parameters(name, parameters):
    assert _parameters(name) == parameters


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="model must be one of .*did you mean 'llama-3.1-8b'"):
        models.config("lama-3.1-8b")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("qwen3-0.6b/", "did you mean 'qwen3-0.6b'"), ("a team/model", "or give owner/name")],
)
def test_what_no_repository_is_called_gets_our_sentence(name, remedy):
    """Reported: "Repo id must use alphanumeric chars" of the hub's client, without a field."""
    with pytest.raises(ValueError, match=f"^model must be one of .*got '{name}'; {remedy}"):
        models.config(name)


def test_config_from_folder_and_file(tmp_path):
    models.config("qwen3-0.6b").save_pretrained(tmp_path)
    assert models.config(str(tmp_path)).hidden_size == 1024
    assert models.config(str(tmp_path / "config.json")).model_type == "qwen3"


@pytest.mark.parametrize("text", ["{", '{"model_type": "none-such"}', '{"hidden_size": 1}', "[]"])
def test_damaged_config_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"model must be a Hugging Face config.json.*got .*json"):
        models.config(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "remedy"), [("qwen33", "did you mean qwen3"), ("none-such", "update transformers")]
)
def test_an_unknown_type_is_one_line_with_the_nearest(tmp_path, kind, remedy):
    """Reported: it came with transformers' list of all types, 2 kB."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=remedy) as refused:
        models.config(str(tmp_path))
    assert kind in str(refused.value) and len(str(refused.value)) < 300 + len(str(tmp_path))


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; .*save_pretrained"):
        models.config(str(tmp_path))


@pytest.mark.parametrize("path", ["./qwen99", "../qwen99", "/nowhere/qwen99", "~/qwen99"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(path):
    """Reported: "Repo id must use alphanumeric chars"."""
    with pytest.raises(ValueError, match="^model must be a folder that exists, got .*qwen99'; che"):
        models.config(path)


def test_hub_id_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="model must be reachable on the hub, got 'nobody/"):
        models.config("nobody/nothing")


@pytest.mark.parametrize("status", [None, 404, 401, 503])
def test_the_hub_is_asked_once_and_then_what_is_here(monkeypatch, status):
    """Silence and 5xx: only what was downloaded before is looked for. A no is an answer."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import AutoConfig

    asked, looked = [], []

    def metadata(url, **options):
        asked.append((url, options))
        if status is None:
            raise HfHubHTTPError.__bases__[0]("no name server")  # of the library below
        request = httpx.Request("HEAD", url)
        raise HfHubHTTPError("no", response=httpx.Response(status, request=request))

    def from_pretrained(source, **options):
        looked.append((source, options))
        raise OSError("not here")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="^model must be reachable on the hub, got 'a/b'; check"):
        models.config("a/b")
    ((url, options),) = asked
    assert url.endswith("/a/b/resolve/main/config.json") and options["timeout"] <= 5
    silent = status is None or status == 503
    assert looked == [("a/b", {"local_files_only": silent})]


def test_bundled_is_a_small_llama():
    config = models.config(BUNDLED)
    assert config.model_type == "llama"
    assert 1e6 < _parameters(BUNDLED) < 3e6
    assert (
        json.loads((Path(BUNDLED) / "config.json").read_text())["vocab_size"] == config.vocab_size
    )
