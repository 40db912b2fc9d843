"""The rooms beside the library, under one name each: `dit_jax.launch`, `dit_jax.distill`, ...

An installation has them as subpackages of `dit_jax`. In a checkout they are folders beside it, and
a finder gives them the same names there: `python launch/train.py` needs no installation, and no
module is loaded twice.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOMS = ("configs", "distill", "interop", "launch", "parallel", "pipelines")
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


def folder(room: str) -> Path:
    """Where a room's files are, in a checkout or an installation; it is not imported."""
    inside = _PACKAGE / room
    return inside if inside.is_dir() else _PACKAGE.parent / room


def find_in_checkout() -> None:
    """Makes the rooms of a checkout subpackages of `dit_jax`; nothing where it is installed.

    The finder comes first: an editable installation may belong to another checkout.
    """
    if not (_PACKAGE / "launch").is_dir():
        sys.meta_path.insert(0, CheckoutFinder())


def require_installed_name(name: str) -> None:
    """Refuses a room that is imported as a module of its own; rooms call it first.

    Where the checkout itself is on the path, `import parallel` would find the folder and load a
    second copy, whose classes and registries are not those of `dit_jax.parallel`.

    Raises:
        ImportError: `name` is not the one under `dit_jax`.
    """
    if name in ROOMS:
        raise ImportError(f"{name} is dit_jax.{name}: import it by that name", name=name)


def answer_to_former_name(room: str) -> None:
    """Lets `import ROOM` and `import ROOM.x` give the modules of `dit_jax.ROOM`, not copies."""
    sys.meta_path.insert(0, _FormerNameFinder(room))
    sys.modules[room] = importlib.import_module(f"dit_jax.{room}")


def know_former_name(room: str) -> None:
    """`answer_to_former_name`, unless a module of that name is on the path."""
    if importlib.util.find_spec(room) is None:
        answer_to_former_name(room)


class _FormerNameFinder(MetaPathFinder):
    def __init__(self, room: str):
        self._prefix = f"{room}."

    def find_spec(self, fullname, path, target=None):
        if not fullname.startswith(self._prefix):
            return None
        return importlib.util.spec_from_loader(fullname, _InstalledModule())


class _InstalledModule(Loader):
    """Gives a module that is there already, as it is."""

    def create_module(self, spec):
        module = importlib.import_module(f"dit_jax.{spec.name}")
        spec.loader_state = module.__spec__  # the import system replaces it by `spec`
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state
