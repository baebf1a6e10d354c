"""`python -m instructor.selfcheck`: a notebook's checks with the grader's limits.

It is `grade/own_check.py`. The check that stands in each notebook is `build/selfcheck.py`.
"""

import sys

from .grade.own_check import main

if __name__ == "__main__":
    sys.exit(main())
