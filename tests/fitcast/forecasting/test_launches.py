"""The rate at which a host launches operations: measured where the run will be, else recorded."""

import time

import pytest

from fitcast import gpus
from fitcast.forecasting import launches
from fitcast.forecasting.launches import launch_rate


@pytest.fixture
def here(monkeypatch):
    """A machine whose card says that it is a T4."""
    monkeypatch.setattr(gpus, "detect", lambda: gpus.T4)
    launches.measured_seconds.cache_clear()
    yield
    launches.measured_seconds.cache_clear()


def test_another_machines_card_has_the_recorded_rate(here):
    rate = launch_rate(gpus.H200)
    assert (rate.seconds, str(rate)) == (
        4.5e-5,
        "45 µs to launch an operation (recorded on an H200's host, 2026-11)",
    )


def test_this_machines_card_has_the_rate_of_this_host(here, monkeypatch):
    """A host that is held up for 0.2 s in each step has a rate that says so."""
    rate = launch_rate(gpus.T4)
    assert rate.basis == "measured on this host" and 1e-6 < rate.seconds < 1e-3
    assert launch_rate(gpus.T4).seconds == rate.seconds  # once for a process
    launches.measured_seconds.cache_clear()
    monkeypatch.setattr(gpus, "synchronize", lambda: time.sleep(0.2))
    assert launch_rate(gpus.T4).seconds > rate.seconds + 1e-4
