"""The doctor says about the hub what huggingface_hub itself goes by."""

import os
import subprocess
import sys

import pytest

from fitcast.cli import doctor

ASK = "from fitcast.cli.doctor import _hub; print(_hub().found)"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("HF_HUB_OFFLINE", "1", "switched off by"),
        ("HF_HUB_OFFLINE", "false", "allowed"),
        ("TRANSFORMERS_OFFLINE", "1", "switched off by"),
        ("TRANSFORMERS_OFFLINE", "0", "allowed"),
    ],
)
def test_the_hub_is_off_when_the_library_says_so(variable, value, words):
    others = {name: text for name, text in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=others | {variable: value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(words)


def test_the_doctor_does_without_the_hubs_library(monkeypatch):
    known = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: None if name == "huggingface_hub" else known(name)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "hub" not in [finding.name for finding in doctor.doctor()]
