"""Two workers share the tests: by module, so that what a module has made is made once."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_collection_modifyitems
from tools.notebooks import ROOT

MODULES = ("tests/fitcast/test_units.py", "tests/house/test_verbs.py")


@pytest.mark.slow
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


class Case:
    """As much of a collected test as the order of tests looks at."""

    def __init__(self, nodeid, *named):
        self.nodeid, self.path, self.named, self.added = nodeid, Path(nodeid), named, []

    def get_closest_marker(self, name):
        return name if name in self.added else None

    def iter_markers(self, name):
        return iter([SimpleNamespace(args=self.named)])

    def add_marker(self, name):
        self.added.append(name)


def test_of_a_test_marked_one_fast_one_case_stays_fast():
    first = [Case(f"test_a.py::test_it[{case}]") for case in "wxy"]
    first[0].add_marker("slow")  # before: it is not the one that stays
    named = [Case(f"test_b.py::test_it[{case}]", "y") for case in "xyz"]
    pytest_collection_modifyitems([*first, *named])
    assert [case.added for case in first] == [["slow"], [], ["slow"]]
    assert [case.added for case in named] == [["slow"], [], ["slow"]]
