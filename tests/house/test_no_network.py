"""The tests' own guard: nothing here, and nothing that the tests start, reaches another machine."""

import subprocess
import sys
import urllib.request

import pytest

ADDRESS = "https://huggingface.co"


def test_a_request_is_caught():
    with pytest.raises(OSError, match="Connection refused|huggingface.co was asked for"):
        urllib.request.urlopen(ADDRESS, timeout=5)
    with pytest.raises(OSError, match="tests have no network, and huggingface.co was asked for"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(ADDRESS, timeout=5)


def test_a_request_of_another_process_is_caught():
    code = f"import urllib.request; urllib.request.urlopen({ADDRESS!r}, timeout=5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "Connection refused" in done.stderr
