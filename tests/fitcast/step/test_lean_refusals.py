"""Where the lean pieces do not hold: they say so, or take the usual path."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from course_utils.data import BUNDLED
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.step.lean import use_lean_lora, use_lean_rotary
from fitcast.step.levers import explicit_kv_attention
from fitcast.step.losses import chunked_loss, lean_loss
from fitcast.units import IGNORED

# PEFT 0.21 asks transformers 5.23 under the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def tiny(kind: str, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more)).eval()


@pytest.mark.parametrize("kind", ["glm", "glm4", "cohere", "helium", "ernie4_5"])
def test_neighbouring_pairs_are_not_turned(kind):
    with pytest.raises(ValueError, match="rotary must be 'stock' for .*Attention, got 'lean'"):
        use_lean_rotary(tiny(kind))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "mistral", "gemma2", "olmo2"])
def test_halves_are_turned_as_the_model_does(kind):
    model, ids = tiny(kind), torch.arange(1, 12)[None]
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        use_lean_rotary(model)
        torch.testing.assert_close(model(input_ids=ids).logits, stock, rtol=1e-5, atol=1e-6)


def test_lean_adapters_on_a_16_bit_base_without_autocast():
    recipe = TrainRecipe(model=BUNDLED, base="bfloat16", lora_targets=("q_proj",))
    model = qlora.add_adapters(tiny("llama").to(torch.bfloat16), recipe).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # zero at the start
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        use_lean_lora(model)
        assert torch.equal(model(input_ids=ids).logits, stock)


def adapted(**options):
    """A model with adapters that have learnt something, and PEFT's own answer."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=["o_proj"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 12)[None]).logits


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_that_are_more_than_two_matrices_are_refused(options, words):
    model = tiny("llama")
    if "lora_bias" in options:
        model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(32))
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj"], **options))
    with pytest.raises(
        ValueError, match=f"^adapters must be 'stock' for LoRA with {words}, got 'l"
    ):
        use_lean_lora(model)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_other_scalings_are_kept(options):
    model = adapted(**options)
    stock = logits(model)
    use_lean_lora(model)
    torch.testing.assert_close(logits(model), stock, rtol=1e-5, atol=1e-6)


def test_adapters_that_come_later_take_the_usual_path():
    """DoRA on the same layer, or LoRA on another one, which this layer then does without."""
    from peft import LoraConfig

    for late in (
        LoraConfig(r=4, target_modules=["o_proj"], use_dora=True),
        LoraConfig(r=4, target_modules=["q_proj"]),
    ):
        found = []
        for lean in (False, True):
            model = adapted()
            if lean:
                use_lean_lora(model)
            model.add_adapter("late", late)
            model.set_adapter("late")
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "late" in name:
                    torch.nn.init.normal_(parameter)
            found.append(logits(model))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_only_linear_layers_are_changed():
    """An adapted embedding has matrices of another form."""
    from peft import LoraConfig, get_peft_model

    both = LoraConfig(r=4, target_modules=["o_proj", "embed_tokens"])
    model = get_peft_model(tiny("llama"), both).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    stock = logits(model)
    use_lean_lora(model)
    torch.testing.assert_close(logits(model), stock, rtol=1e-5, atol=1e-6)


QUERY, KEY = torch.randn(2, 1, 2, 6, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_that_is_more_than_a_scaled_product_is_refused(name):
    """What Gemma 2 and gpt-oss hand over was once left out in silence."""
    more = {name: 50.0 if name == "softcap" else torch.zeros(2)}
    with pytest.raises(
        ValueError, match=f"^attention must be 'stock' or 'eager' for .* has {name}"
    ):
        explicit_kv_attention(None, QUERY, KEY, KEY, None, **more)
    explicit_kv_attention(None, QUERY, KEY, KEY, None, **{name: None}, sliding_window=4)


@pytest.mark.parametrize("said_by", ["argument", "module"])
def test_attention_that_sees_what_comes_later_stays_so(said_by):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = torch.nn.Module()
    layer.is_causal = said_by == "argument"
    given = {"is_causal": False} if said_by == "argument" else {}
    want, _ = sdpa_attention_forward(layer, QUERY, KEY, KEY, None, **given)
    got, _ = explicit_kv_attention(layer, QUERY, KEY, KEY, None, **given)
    torch.testing.assert_close(got, want)
    causal, _ = explicit_kv_attention(None, QUERY, KEY, KEY, None)
    assert not torch.allclose(causal, want)


def head(kind):
    linear = torch.nn.Linear(8, 16, bias=kind == "a bias")
    linear.weight.requires_grad_(kind == "training")
    if kind == "an adapter":
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        return Linear(linear, "default", LoraConfig(r=2), r=2, lora_alpha=2)
    return linear


@pytest.mark.parametrize("kind", ["a bias", "an adapter", "training"])
def test_a_head_that_the_lean_loss_would_leave_out_is_refused(kind):
    rows, labels = torch.randn(1, 6, 8, requires_grad=True), torch.arange(6)[None]
    with pytest.raises(ValueError, match="^loss must be 'full' or 'chunked' for a head .*, got 'l"):
        chunked_loss(rows, head(kind), labels, 4, lean=True)
    chunked_loss(rows, head(kind), labels, 4)  # the chunked one has all of it
    if kind == "training":
        with pytest.raises(ValueError, match="for a head that is trained"):
            lean_loss(rows[0], head(kind).weight, labels[0])


@pytest.mark.parametrize("loss", ["full", "chunked", "lean"])
def test_a_step_without_labels_leaves_the_adapters_finite(loss):
    recipe = TrainRecipe(
        model=BUNDLED, base="float32", loss=loss, optimizer="adamw", sequence_length=16
    )
    model = qlora.add_adapters(qlora.load_base(recipe), recipe).train()
    ids = torch.randint(10, 100, (1, 16))
    batch = {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}
    found = qlora.training_step(model, qlora.build_optimizer(model, recipe), [batch], recipe)
    assert found.item() == 0
    assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_max_grad_norm_of_zero_does_not_clip():
    recipe = TrainRecipe(
        model=BUNDLED, base="float32", optimizer="adamw", sequence_length=16, max_grad_norm=0.0
    )
    model = qlora.add_adapters(qlora.load_base(recipe), recipe).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    ids = torch.randint(10, 100, (1, 16))
    qlora.training_step(
        model, qlora.build_optimizer(model, recipe), [{"input_ids": ids, "labels": ids}], recipe
    )
    assert not all(torch.equal(*pair) for pair in zip(before, weights, strict=True))


def test_an_evaluation_of_a_model_whose_head_could_be_trained_has_its_loss():
    """A merged model is loaded with every weight trainable, and only evaluated."""
    hidden, head = torch.randn(5, 32), torch.randn(64, 32, requires_grad=True)
    targets = torch.tensor([3, 7, IGNORED, 1, 2])
    with torch.no_grad():
        found = lean_loss(hidden, head, targets, 2)
    wanted = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    assert found == pytest.approx(wanted.item(), rel=1e-5)
