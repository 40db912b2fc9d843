"""The rooms beside the library, under one name each: `dit_jax.launch`, `dit_jax.distill`, ...

An installation has them as subpackages of `dit_jax`. In a checkout they are folders beside it, and
a finder gives them the same names there: `python launch/train.py` needs no installation, and no
module is loaded twice.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOMS = ("configs", "distill", "interop", "launch", "parallel")
_PACKAGE = Path(__file__).resolve().parent


class CheckoutFinder(MetaPathFinder):
    """Finds `dit_jax.ROOM` in the folder ROOM beside the library."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The room's package; None for all other modules, those inside rooms among them."""
        package, _, room = fullname.rpartition(".")
        if package != "dit_jax" or room not in ROOMS:
            return None
        return PathFinder.find_spec(fullname, [str(_PACKAGE.parent)])


def find_in_checkout() -> None:
    """Makes the rooms of a checkout subpackages of `dit_jax`; nothing where it is installed.

    The finder comes first: an editable installation may belong to another checkout.
    """
    if not (_PACKAGE / "launch").is_dir():
        sys.meta_path.insert(0, CheckoutFinder())
