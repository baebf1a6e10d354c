"""`python -m instructor.grade`."""

import importlib.util
import sys

if not importlib.util.find_spec("resource"):  # nor has Windows what the command imports
    print(
        "Nothing graded: grading must run on Linux or macOS, got a system without Unix's limits "
        "on processes, such as Windows; use WSL or a Linux container",
        file=sys.stderr,
    )
    sys.exit(2)

from .grade import main

sys.exit(main())
