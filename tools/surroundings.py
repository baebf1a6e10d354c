"""Where this repository is, and what every headless run of a notebook or a test finds around it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Every headless run, the tests included, sees the same machine-independent surroundings.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars obey it too
    "TOKENIZERS_PARALLELISM": "false",
    # Sums are added up in one order on every machine, and no thread spins for a core it shares.
    "OMP_NUM_THREADS": "1",
    # A forecast is worked out, never read from the disk: the code under test makes it.
    "FITCAST_CACHE": "0",
    # Figures are drawn once, at the end, and not while a run goes on.
    "FITCAST_HEADLESS": "1",
    # ipykernel captures C-level stderr unless it believes that pytest runs.
    "PYTEST_CURRENT_TEST": "a lesson, headless",
}
