"""`python -m instructor.build`."""

import sys

from .build import main

sys.exit(main())
