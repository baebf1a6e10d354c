"""What every test shares: no network, no GPU and no progress bars, before torch is imported."""

import gc
import os
import socket
from pathlib import Path

import pytest

from tools.surroundings import ENVIRONMENT

BROWSER_TESTS = Path(__file__).parent / "browser"
# The modules that take longest start first, so that no worker is left alone with one at the end.
LONGEST = (
    "test_notebooks", "test_forecast", "test_attacks", "test_levers", "test_cli", "test_trainer",
    "test_lesson_03", "test_forecast_step", "test_search", "test_fairness", "test_sandbox",
    "test_colab", "test_tools", "test_grade", "test_families", "test_lesson_02",
)  # fmt: skip
os.environ.update({name: value for name, value in ENVIRONMENT.items() if "PYTEST" not in name})
# For what the tests start, kernels included: a proxy that is not there. Only this machine answers.
os.environ.update(
    HTTP_PROXY="http://127.0.0.1:9",
    HTTPS_PROXY="http://127.0.0.1:9",
    NO_PROXY="127.0.0.1,localhost",
)
# What is compared was made on a CPU: committed outputs, tensors beside a model that would be on the
# GPU. Tests that need one run without this file: tools/record_gpu_run.py --groups tests.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
HERE = (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname())


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """No name server: whoever asks for another machine is told which one it asked for."""
    with pytest.MonkeyPatch.context() as patch:
        look_up = socket.getaddrinfo

        def getaddrinfo(host, *args, **options):
            if host not in HERE:
                raise OSError(f"tests have no network, and {host} was asked for")
            return look_up(host, *args, **options)

        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


def pytest_ignore_collect(collection_path, config):
    """tests/browser needs a browser: it runs when it is named, as `make test-browser` does."""
    if collection_path == BROWSER_TESTS and not any("browser" in arg for arg in config.args):
        return True
    return None


def pytest_collection_finish():
    """What is imported stays: no search for rubbish, of which there are many, looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """In the order of `LONGEST`; of a test marked `one_fast` all cases but one are slow."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    kept: dict[str, str] = {}
    for item in items:
        for mark in [] if item.get_closest_marker("slow") else item.iter_markers("one_fast"):
            test, case = item.nodeid.partition("[")[::2]
            kept.setdefault(test, f"{mark.args[0]}]" if mark.args else case)
            if case != kept[test]:
                item.add_marker("slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A module stays on one worker, whose fixtures and forecasts it finds again.

    The lessons are executed one by one, on whichever worker is free. xdist's own groups are written
    into `_nodeid`, which pytest 9.2 reads no more: each test went to the next free worker.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "::test_lesson_reproduces" in nodeid else nodeid.split("::")[0]

    return ByModule(config, log)
