"""What a reader types: small slips are forgiven, an absurd number is refused by name."""

import pytest

from course_utils.data import BUNDLED
from fitcast.cli import main as cli

SMALL = ["--model", BUNDLED, "--sequence-length", "64"]


def test_targets_may_be_written_with_spaces():
    asked = cli.parser().parse_args(["forecast", *SMALL, "--lora-targets", "q_proj, v_proj"])
    assert cli.recipe_of(asked).lora_targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("option", "value"), [("utilisation", "7"), ("target-effective-batch", "100003")]
)
def test_an_absurd_number_is_refused_by_the_name_of_its_option(capsys, option, value):
    assert cli.main(["fit", *SMALL, f"--{option}", value]) == 2
    told = capsys.readouterr().err
    assert f"error: {option.replace('-', '_')} must be " in told and f"got {value}" in told
