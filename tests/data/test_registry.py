import subprocess
import sys

import pytest

from dit_jax.data import open_source


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"unknown data source 'digit': .*did you mean digits"):
        open_source("digit", "train")
    with pytest.raises(ValueError, match=r"no option 'image_sise': .*did you mean image_size\?"):
        open_source("image_folder", "train", path="x", image_sise=32)
    with pytest.raises(
        ValueError, match=r"'digits' has no option 'path': expected one of image_size, re"
    ):
        open_source("digits", "train", path="x")
    with pytest.raises(ValueError, match="'tfds' needs the option 'dataset'"):
        open_source("tfds", "train")


def test_importing_loads_nothing_heavy():
    program = (
        "import sys, dit_jax.data\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'torch', 'diffusers', 'sklearn', 'grain'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
