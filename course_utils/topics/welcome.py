"""What a lesson's set-up cell says: when the course was last verified, and what this runtime lacks.

Not modelled: whether versions between the verified ones work.
"""

from __future__ import annotations

import os

from fitcast import __version__, gpus
from fitcast.training import versions

COLAB_VARIABLE = "COLAB_RELEASE_TAG"  # Colab sets it, nobody else does
NO_GPU = (
    'This Colab runtime has no GPU: every lesson runs; for the lines that say "measured" '
    "choose Runtime > Change runtime type > T4 GPU."
)


def banner() -> str:
    """When and with what the course was last verified, in one line."""
    seen = versions.record()
    pins, colab = (
        f"torch {side['torch']} and transformers {side['transformers']}"
        for side in (seen["pins"], seen["colab"])
    )
    return (
        f"Course {__version__}, last verified on {seen['date']} with {pins}, "
        f"and with Colab's {colab}."
    )


def on_colab() -> bool:
    """Whether this is a Colab runtime."""
    return COLAB_VARIABLE in os.environ


def remarks() -> list[str]:
    """What this runtime calls for, one sentence each; none on a verified one like a T4's."""
    if old := versions.too_old():
        remedy = (
            "choose Runtime > Change runtime type > Runtime version > Latest, then run this "
            "cell again"
            if on_colab()
            else "run `pip install -r requirements.txt` in the "
            "course's folder, then restart the kernel"
        )
        return [f"This runtime is older than the course, {', '.join(old)}: {remedy}."]
    said = []
    if drift := versions.drifted():
        said.append(
            f"Newer here than when verified: {', '.join(drift)}; if a cell fails, "
            "`fitcast doctor` shows what to report."
        )
    gpu = gpus.detect()
    if gpu is None and on_colab():
        said.append(NO_GPU)
    elif gpu is not None and gpu.total_bytes > gpus.T4.total_bytes:
        said.append(
            f"{gpu.name} holds more than a T4: what fits here may not fit there; "
            f"forecasts for a T4 still hold, and "
            f"{gpus.EMULATE_VARIABLE}=T4 in the environment turns this card into one."
        )
    return said


def welcome() -> str:
    """What every lesson's set-up cell prints: the banner and this runtime's remarks."""
    return "\n".join([banner(), *remarks()])
