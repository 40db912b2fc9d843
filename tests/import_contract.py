"""import-linter on the tree as it is installed: python -m tests.import_contract.

In a checkout the rooms lie beside the library, and import-linter reads folders: it finds no
`dit_jax.launch` there. So they are put together in a temporary folder first.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dit_jax.rooms import ROOMS

ROOT = Path(__file__).parents[1]


def assemble(folder: Path) -> None:
    """Copies the library with its rooms inside it, and the contract, into `folder`."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dit_jax", folder / "dit_jax", ignore=ignored)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / "dit_jax" / room, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


def check(folder: Path) -> subprocess.CompletedProcess:
    """Checks the contract on what `assemble` put into `folder`."""
    lint = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-P", "-c", lint, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        assemble(Path(directory))
        sys.exit(check(Path(directory)).returncode)
