"""The forecast of a merge against PEFT's own on a CPU."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fitcast.forecasting.merging import forecast_merge
from fitcast.gpus import T4
from fitcast.memory.ledger import MemoryLedger
from fitcast.units import GIB

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=9,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
ADAPTERS = LoraConfig(r=8, target_modules="all-linear")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_a_merge_takes_what_it_takes_on_real_tensors():
    model = get_peft_model(LlamaForCausalLM(CONFIG), ADAPTERS).eval()
    with MemoryLedger(model) as ledger:
        model.merge_and_unload()
    measured = ledger.report().peak_bytes
    seen = forecast_merge(CONFIG, ADAPTERS, dtype="float32")
    assert seen.peak_allocated_bytes - T4.workspace_bytes == pytest.approx(measured, rel=2e-3)
    assert f" {measured / GIB:.2f} GiB of its memory" in seen.notes[-1]


def test_weights_in_4_bits_are_not_merged_into():
    asked = {"dtype": "float16", "quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    with pytest.raises(ValueError, match="^quantization_config must be left out where adapters"):
        forecast_merge(CONFIG, ADAPTERS, **asked)
