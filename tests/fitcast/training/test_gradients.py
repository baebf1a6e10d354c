"""float64 from end to end: against finite differences, and what it is good for."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fitcast.training.gradients import gradient, in_float64, relative_error, token_loss

IDS = torch.randint(128, (4, 24), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[0, 3:], LABELS[1, 2:] = -100, -100


def build():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


def gradient_of(model, weights):
    """The weighted sum of the rows' gradients."""
    model.zero_grad()
    for row, weight in enumerate(weights):
        loss = model(input_ids=IDS[row : row + 1], labels=LABELS[row : row + 1]).loss
        (loss * weight).backward()
    return gradient(model)


@pytest.mark.parametrize(
    ("prepare", "equal"),
    [(in_float64, True), (torch.nn.Module.double, False)],
    ids=["in_float64", "double"],
)
def test_only_float64_throughout_is_exact(prepare, equal):
    """The same mean, divided before backward and after: rounding to float32 in between shows."""
    model, tokens = prepare(build()), (LABELS[:, 1:] != -100).sum(1).double()
    before = gradient_of(model, tokens / tokens.sum())
    after = gradient_of(model, tokens) / tokens.sum()
    assert (relative_error(after, before) < 1e-12) == equal


def test_it_stays_the_same_function():
    model = build()
    loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    before = gradient(model)
    model.zero_grad()
    exact = in_float64(model)(input_ids=IDS, labels=LABELS).loss
    exact.backward()
    assert exact.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(before, gradient(model)) < 1e-6


def test_gradient_is_the_slope():
    """Against a finite difference along a random direction."""
    model = in_float64(build())

    def loss():
        return model(input_ids=IDS, labels=LABELS).loss

    loss().backward()
    slope = gradient(model)
    direction = torch.randn(slope.shape, dtype=torch.float64)
    direction /= direction.norm()
    values = []
    for step in (1e-5, -2e-5):
        parts = iter((step * direction).split([p.numel() for p in model.parameters()]))
        with torch.no_grad():
            for p in model.parameters():
                p += next(parts).view_as(p)
            values.append(loss().item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((slope @ direction).item(), rel=1e-6)


def test_token_loss_divides_by_what_it_is_given():
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, -100, -100], [-100, -100, -100, 4, -100]])
    mean = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].flatten())
    assert token_loss(logits, labels, 7).item() == pytest.approx(mean.item(), rel=1e-14)
    assert token_loss(logits, labels, 7, 30).item() == pytest.approx(mean.item() / 10, rel=1e-14)


def test_relative_error_of_float32_vectors_is_exact():
    ones = torch.ones(2_000_000)
    assert relative_error(ones * (1 + 1e-3), ones) == pytest.approx(1e-3, rel=1e-4)
    assert relative_error(torch.zeros(5), torch.ones(5)) == 1.0
