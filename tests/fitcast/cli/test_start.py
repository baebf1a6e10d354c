"""A process of its own leaves out what costs it time, and nothing else."""

import subprocess
import sys

import pytest
import transformers.models
from transformers.utils.import_utils import _LazyModule

from fitcast.cli import start


def test_what_the_package_knows_of_its_models_is_what_their_files_say():
    real = transformers.models
    ours = _LazyModule(real.__name__, real.__file__, start.what_models_define())
    assert ours._class_to_module == real._class_to_module and "LlamaConfig" in ours._class_to_module
    assert ours._modules == real._modules and set(ours.__all__) == set(real.__all__)
    both = (ours._object_missing_backend, real._object_missing_backend)
    one, two = ({name: sorted(lacks) for name, lacks in each.items()} for each in both)
    assert one == two


@pytest.mark.slow
def test_the_models_files_are_read_once():
    code = """
import transformers.utils.import_utils as files
from fitcast.cli import start
start.quickly()
read = []
files.create_import_structure_from_path = lambda path: read.append(path) or {}
start.engine()
from transformers.models import llama
print(len(read))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "1", "more than Llama's own folder is read"
