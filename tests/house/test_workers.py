"""Two workers share the tests: by module, so that what a module has made is made once."""

import subprocess
import sys
from collections import defaultdict

from tools.notebooks import ROOT

MODULES = ("tests/fitcast/test_units.py", "tests/house/test_verbs.py")


def test_a_module_stays_on_one_worker():
    command = [sys.executable, "-m", "pytest", "--verbose", "-p", "no:cacheprovider", *MODULES]
    command += ["--numprocesses", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    workers = defaultdict(list)
    for line in told.splitlines():
        worker, passed, test = line.partition(" PASSED ")
        if passed:
            workers[test.split("::")[0]].append(worker[:5])
    assert workers.keys() == set(MODULES), told
    assert all(len(names) > 1 and len(set(names)) == 1 for names in workers.values()), told
