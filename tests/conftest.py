"""What every test shares: no network, and no progress bars, before anything heavy is imported."""

import os

from tools.notebooks import ENVIRONMENT

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS",
             "TOKENIZERS_PARALLELISM"):
    os.environ[name] = ENVIRONMENT[name]
