"""The commands live in `fitcast` now; this door answers for one more release."""

import sys

from fitcast.cli.main import main

print("`python -m course_utils` is now `fitcast` (or `python -m fitcast`)", file=sys.stderr)
sys.exit(main())
