"""What the lessons share for teaching: exercises, figures, the topics' instruments, the data.

The engine that counts and forecasts is `fitcast`; nothing in it needs this package.
"""

import fitcast  # noqa: F401  (quiets bitsandbytes and the hub's client, as it does for everyone)
