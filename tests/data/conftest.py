import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_image(tmp_path):
    """Write random pixels as an image file below tmp_path; return the pixels."""

    def write(name, size=(28, 28), mode="L", seed=0, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        bands = len(Image.new(mode, (1, 1)).getbands())
        shape = size[::-1] if bands == 1 else (*size[::-1], bands)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(path, **options)
        return pixels

    return write
