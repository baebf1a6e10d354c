"""`python -m instructor.release`: pack what students get (`build/release.py`)."""

import sys

from .build.release import main

if __name__ == "__main__":
    sys.exit(main())
