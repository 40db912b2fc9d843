"""One name for every module, in a checkout as installed; the import contract sees all rooms."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dit_jax.rooms import ROOMS
from tests import import_contract

ROOT = Path(__file__).parents[1]


def python(code, cwd):
    """Runs code with nothing but the checkout on the path."""
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


# Imports every module there is under its name; whatever comes from a file has come once.
ONCE = """
import importlib, pathlib, pkgutil
import dit_jax
from dit_jax.rooms import ROOMS
for package in (dit_jax, *(importlib.import_module(f"dit_jax.{room}") for room in ROOMS)):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if "launch." not in module.name:  # commands define flags of the same names
            importlib.import_module(module.name)
import dit_jax.launch.train
seen = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and pathlib.Path(file).is_relative_to(%r) and ".venv" not in file:
        assert name.partition(".")[0] == "dit_jax", name
        assert seen.setdefault(file, name) == name, (file, name, seen[file])
print(len(seen))
"""


def test_no_module_is_loaded_twice(tmp_path):
    done = python(ONCE % str(ROOT), tmp_path)
    assert int(done.stdout or 0) > 150, done.stderr


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "configs"])
def test_a_room_imported_as_a_module_of_its_own_is_refused(room, tmp_path):
    for statement in (f"import {room}", f"from {room} import nothing", f"import {room}.nothing"):
        done = python(statement, tmp_path)
        assert f"ImportError: {room} is dit_jax.{room}: import it by that name" in done.stderr


def test_configs_of_users_may_say_configs(tmp_path):
    code = """
from configs import digits
from configs.digits_cm import get_config
import configs.digits_kd
import dit_jax.configs, dit_jax.configs.digits, dit_jax.configs.digits_cm, dit_jax.configs.digits_kd
assert configs is dit_jax.configs and digits is dit_jax.configs.digits is configs.digits
assert get_config is dit_jax.configs.digits_cm.get_config
assert sys.modules["configs.digits_kd"] is dit_jax.configs.digits_kd
assert configs.digits_kd.__spec__.name == configs.digits_kd.__name__ == "dit_jax.configs.digits_kd"
"""
    done = python(code, tmp_path)
    assert not done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    import_contract.assemble(folder)
    return folder


@pytest.mark.parametrize(
    "importer,imported",
    [
        ("ranges", "launch.command"),
        ("training/loop", "parallel.mesh"),
        ("distill/kd", "interop.models"),
        ("parallel/mesh", "distill.student"),
        ("interop/models", "launch.methods"),
        ("configs/digits", "experiment"),
        ("models/dit", "diffusion.process"),
        ("new", "ranges"),
    ],
)
def test_the_import_contract_sees_every_room(tree, importer, imported, capfd):
    file = tree / "dit_jax" / f"{importer}.py"
    before = file.read_text() if file.exists() else None
    try:
        file.write_text(f"{before or ''}\nfrom dit_jax.{imported} import anything\n")
        assert import_contract.check(tree).returncode == 1
    finally:
        file.write_text(before) if before is not None else file.unlink()
    assert ("new" if importer == "new" else imported) in capfd.readouterr().out


def test_an_installation_has_every_package_under_one_name():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {f"dit_jax.{room}": room for room in ROOMS} | {"dit_jax": "dit_jax"}
    assert setup["package-dir"] == folders
    found = set()
    for name, folder in folders.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((name, *path.parent.relative_to(ROOT / folder).parts)))
    assert set(setup["packages"]) == found


def test_importing_the_library_and_its_options_starts_no_backend():
    # Several processes join before JAX starts.
    code = (
        "from dit_jax import options; options.schema(); import dit_jax.launch.training; "
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
