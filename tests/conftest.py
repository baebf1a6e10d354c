"""What every test shares: no network, and no progress bars, before anything heavy is imported."""

import os
from pathlib import Path

from tools.notebooks import ENVIRONMENT

BROWSER_TESTS = Path(__file__).parent / "browser"
os.environ.update({name: value for name, value in ENVIRONMENT.items() if "PYTEST" not in name})


def pytest_ignore_collect(collection_path, config):
    """tests/browser needs a browser: it runs when it is named, as `make test-browser` does."""
    if collection_path == BROWSER_TESTS and not any("browser" in arg for arg in config.args):
        return True
    return None
