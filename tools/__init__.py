"""What keeps the course whole: executing lessons, recording GPUs, building the site.

nbformat asks jsonschema, which on import builds a parser for each part of an internationalized
address: two seconds of every process that reads a notebook, and no notebook has such a field.
"""

import sys

sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # jsonschema does without
