"""A reader's own step is forecast as the recipe's is; what would be counted wrong is refused."""

import pytest
import torch

from course_utils.data import BUNDLED
from fitcast.forecasting.fake import fake_model
from fitcast.forecasting.forecast import forecast, forecast_step
from fitcast.gpus import T4
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora

RECIPE = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_rank=None,
    optimizer="adamw",
    checkpointed_layers=0,
    micro_batch_size=8,
    sequence_length=128,
)


def steps(n: int):
    """n optimizer steps of `RECIPE`, as a reader would write them."""

    def step(model):
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(n):
            batch = {
                "input_ids": torch.zeros(8, 128, dtype=torch.long),
                "labels": torch.zeros(8, 128, dtype=torch.long),
            }
            qlora.training_step(model, optimizer, [batch], RECIPE)

    return step


def test_two_steps_need_what_the_recipe_needs_and_one_needs_less():
    model = qlora.apply_levers(fake_model(BUNDLED, torch.float32), RECIPE)
    one, two = (forecast_step(model, steps(n)).peak_allocated_bytes for n in (1, 2))
    assert two == forecast(RECIPE, T4).peak_allocated_bytes
    assert one < 0.9 * two


def test_an_optimizer_made_outside_is_refused():
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(model):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()

    with pytest.raises(ValueError, match="^step must make its optimizer itself, got one over real"):
        forecast_step(model, step)
    assert not optimizer.state and model.weight.grad is None
