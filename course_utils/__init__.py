"""Measure, forecast and shrink the memory of an LLM fine-tune.

One idea a module; import the one you need (`from course_utils import forecast`). Nothing heavy is
imported here, so that `import course_utils` is instant and `course_utils.recipe` works without
torch.
"""

import logging
import os

# On some CPUs bitsandbytes reports a missing optional kernel when transformers imports it; the
# stored outputs of lessons would differ from machine to machine.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# The hub's client counts who uses it unless it is told not to; a learner's own choice stands.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
