"""`python -m fitcast` is the command `fitcast`."""

import sys

from fitcast.cli.main import main

sys.exit(main())
