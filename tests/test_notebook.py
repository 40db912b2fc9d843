"""docs/digits.ipynb runs from its first cell to its last, and shows what it made."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests import notebooks

FILE = Path(__file__).parents[1] / "docs" / "digits.ipynb"


def pictures(notebook):
    data = [o["data"] for c in notebook["cells"] for o in c.get("outputs", ()) if "data" in o]
    return [base64.b64decode(item["image/png"]) for item in data]


def test_the_notebook_trains_distils_and_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(FILE.read_text())
    (shipped,) = pictures(notebook)
    scope = notebooks.execute(notebook, teacher_steps=16, student_steps=16, batch_size=16)
    assert scope["result"].step == 16
    for name in ("teacher", "student"):
        samples = scope["samples"][name]
        assert samples.shape == (50, 8, 8, 1) and np.isfinite(samples).all()
    (made,) = pictures(notebook)
    size = Image.open(io.BytesIO(made)).size
    assert size == Image.open(io.BytesIO(shipped)).size  # the picture in the file is this one's
    assert len(shipped) < 200_000


def test_the_notebook_is_shipped_as_it_ran():
    cells = [c for c in json.loads(FILE.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    printed = "".join("".join(o.get("text", "")) for cell in cells for o in cell["outputs"])
    assert "into runs/notebook/teacher" in printed and "step 800/800" in printed
