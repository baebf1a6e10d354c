"""What every test shares: no network, and no progress bars, before anything heavy is imported."""

import os

from tools.notebooks import ENVIRONMENT

os.environ.update({name: value for name, value in ENVIRONMENT.items() if "PYTEST" not in name})
