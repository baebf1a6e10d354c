"""`python -m instructor.discussion`: write the page for the meeting (`build/discussion.py`)."""

import sys

from .build.discussion import main

if __name__ == "__main__":
    sys.exit(main())
