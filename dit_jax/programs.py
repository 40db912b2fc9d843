"""Compiled programs in files: made once, loaded by later processes without tracing or compiling.

A file is a line of JSON, which says what the program is and where it runs, and XLA's executable. A
program is used only where all of that is the same: what is compiled in, the inputs' shapes, dtypes
and places, the accelerator, and the versions of JAX. A file is found by a hash of it.

An executable is code. Programs are therefore read from the folder that a user has named and from
nowhere else; the hash of the contents finds damage, not malice.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pickle
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import dit_jax
from dit_jax.atomic import atomic_file
from dit_jax.fp8_kernels import check_compiled
from dit_jax.tree_paths import by_path
from dit_jax.untrusted import parse_json

SUFFIX = ".program"
_FORMAT = 1
_HEADER_LIMIT = 2**22  # bytes
_COMPUTING = ("dit_jax", "dit_jax.parallel", "dit_jax.pipelines")  # whose code programs are of


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile and the inputs to compile it for.

    Attributes:
        name: what it does, as 'sample'.
        function: to be jitted; takes the inputs in order and returns one array.
        compiled_in: what it depends on besides its inputs; values are told apart by their `repr`.
        inputs: pytrees of arrays, or of shapes, by name.
    """

    name: str
    function: Callable[..., Any]
    compiled_in: Mapping[str, Any]
    inputs: Mapping[str, Any]


class ProgramError(ValueError):
    """A file that holds no program, or a damaged one."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Everything a program depends on, as text.

    Attributes:
        name: what it does, as 'sample'.
        compiled_in: the static part: network, process, solver, number of steps ...
        inputs: {path: shape, dtype and sharding}.
        accelerator: kind and number of the devices.
        versions: of what compiled it.
    """

    name: str
    compiled_in: Mapping[str, str]
    inputs: Mapping[str, str]
    accelerator: Mapping[str, str]
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        """A hash of all of it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def filename(self) -> str:
        """Where it is kept."""
        return f"{self.name}-{self.key[:16]}{SUFFIX}"

    def differences(self, other: "Identity") -> list[str]:
        """What is not the same in `other`, each as 'jax 0.10.2 instead of 0.11.0'."""
        return [
            f"{key} {theirs[key]} instead of {ours[key]}"
            for part in ("accelerator", "versions", "compiled_in", "inputs")
            for ours, theirs in [(_all_keys(self, other, part), _all_keys(other, self, part))]
            for key in ours
            if ours[key] != theirs[key]
        ]


def _all_keys(one: Identity, other: Identity, part: str) -> dict[str, str]:
    ours, theirs = getattr(one, part), getattr(other, part)
    return {key: ours.get(key, "none") for key in (*ours, *(k for k in theirs if k not in ours))}


def identify(program: Program, devices: Sequence[jax.Device] | None = None) -> Identity:
    """The identity of a program.

    Args:
        program: what it is.
        devices: on which it runs; None for those that its inputs are on.
    """
    devices = devices_of(program.inputs) if devices is None else devices
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":  # code for one processor may not run on another
        kind = f"{kind} {_processor()}"
    inputs = by_path(dict(program.inputs))
    return Identity(
        program.name,
        {key: repr(value) for key, value in program.compiled_in.items()},
        {path: _describe(leaf) for path, leaf in inputs.items()},
        {"device": kind, "devices": str(len(devices))},
        {
            "dit_jax": f"{dit_jax.__version__} ({_sources()})",
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            **_plugins(devices[0].platform),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        },
    )


def devices_of(inputs: Any) -> list[jax.Device]:
    """The devices that inputs are on, in order; the first one where they are on none."""
    found = {
        device
        for leaf in jax.tree.leaves(inputs)
        if getattr(leaf, "sharding", None) is not None
        for device in leaf.sharding.device_set
    }
    return sorted(found, key=lambda device: device.id) or jax.devices()[:1]


def _describe(leaf: Any) -> str:
    dims = ",".join(map(str, leaf.shape))
    spec = getattr(getattr(leaf, "sharding", None), "spec", None)
    place = f" over {tuple(spec)}" if spec is not None and any(spec) else ""
    return f"{leaf.dtype}[{dims}]{place}"


@functools.cache
def _plugins(platform: str) -> dict[str, str]:
    """Versions of what compiles for a platform beside jaxlib."""
    if platform == "cpu":
        return {}
    names = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        name: names[name]
        for name in sorted(names)
        if name.startswith(("jax-cuda", "jax-rocm", "libtpu"))
    }


@functools.cache
def _sources() -> str:
    """A hash of the library's code: what it computes may change without its version."""
    # Found, not imported: wherever the checkout or installation has them.
    found = (importlib.util.find_spec(name) for name in _COMPUTING)
    folders = [Path(spec.origin).parent for spec in found]
    files = sorted({path for folder in folders for path in folder.rglob("*.py")})
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


@functools.cache
def _processor() -> str:
    """What distinguishes this processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def save(directory: Path, identity: Identity, compiled: jax.stages.Compiled) -> Path:
    """Writes a compiled program; an older file of the same identity is replaced in one step.

    Raises:
        ProgramError: the backend cannot write its programs.
        OSError: the folder cannot be written.
    """
    try:
        payload, _, _ = serialize_executable.serialize(compiled)
    except Exception as error:  # backends raise what they like
        raise ProgramError(
            f"the program {identity.name!r} cannot be kept: the backend does not write its "
            f"executables ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    header = {
        "format": _FORMAT,
        "identity": dataclasses.asdict(identity),
        "bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    path = directory / identity.filename
    with atomic_file(path, overwrite=True) as file:
        file.write(json.dumps(header).encode() + b"\n" + payload)
    return path


def read_header(path: Path) -> tuple[Identity, dict[str, Any]]:
    """The identity of the program in a file, and the rest of its header. Nothing of it runs.

    Raises:
        ProgramError: it holds no program.
    """
    if not path.is_file():
        raise ProgramError(f"{path} is no file")
    with path.open("rb") as file:
        line = file.readline(_HEADER_LIMIT)
    try:
        header = parse_json(line.decode(), "a program's header")
        parts = {key: header["identity"][key] for key in Identity.__dataclass_fields__}
        sound = (
            header["format"] == _FORMAT
            and isinstance(parts.pop("name"), str)
            and all(
                isinstance(part, dict) and all(isinstance(v, str) for v in part.values())
                for part in parts.values()
            )
            and isinstance(header["sha256"], str)
            and isinstance(header["bytes"], int)
        )
        if not sound:
            raise ValueError("another format")
        return Identity(**header["identity"]), header
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ProgramError(
            f"{path} is no compiled program of this version: remove it, and it is made anew"
        ) from error


def why_absent(directory: Path, identity: Identity) -> str:
    """Why there is no program of `identity`: how the nearest one of its name differs."""
    found = []
    for path in sorted(directory.glob(f"{identity.name}-*{SUFFIX}")):
        try:
            found.append(identity.differences(read_header(path)[0]))
        except ProgramError as error:
            return str(error)
    if not found:
        return f"{directory} holds no program {identity.name!r}"
    nearest = min(found, key=len)
    shown = "; ".join(nearest[:3]) + (f"; {len(nearest) - 3} more" if len(nearest) > 3 else "")
    return f"the nearest program {identity.name!r} in {directory} is for {shown}"


def load(
    directory: Path,
    identity: Identity,
    inputs: Any,
    output: Any = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[..., Any]:
    """The compiled program of `identity`, to be called with `*inputs`.

    Args:
        directory: a folder that the user named.
        identity: see `identify`.
        inputs: the tuple of arguments, or of what has their structure.
        output: anything of the result's structure.
        devices: on which it runs; None for those that the inputs are on.

    Raises:
        FileNotFoundError: there is none.
        ProgramError: the file is damaged, or another program's.
    """
    path = directory / identity.filename
    if not path.exists():
        raise FileNotFoundError(why_absent(directory, identity))
    found, header = read_header(path)
    payload = path.read_bytes().partition(b"\n")[2]
    if found != identity:
        raise ProgramError(f"{path} holds another program than its name says: remove it")
    sha256 = hashlib.sha256(payload).hexdigest()
    if (len(payload), sha256) != (header["bytes"], header["sha256"]):
        raise ProgramError(
            f"{path} is damaged: its contents are not those that were written ({len(payload)} of "
            f"{header['bytes']} bytes, or other values). Remove it, and it is made anew"
        )
    devices = devices_of(tuple(inputs)) if devices is None else devices
    structures = jax.tree.structure((tuple(inputs), {})), jax.tree.structure(output)
    try:
        return serialize_executable.deserialize_and_load(
            payload, *structures, execution_devices=devices
        )
    except (pickle.UnpicklingError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProgramError(f"{path} cannot be loaded here ({first}): remove it") from error


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles what XLA's own cache may hold: CPU programs out of it cannot be written again."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which has remembered that there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


class Programs:
    """The compiled programs of a folder: found there, or made and kept there.

    Args:
        directory: a folder that the user named; made if it is not there.
        announce: told of every program whether it was found, and if not, why.
    """

    def __init__(self, directory: Path | str, announce: Callable[[str], None] = print):
        self.directory, self._announce, self._ready = Path(directory), announce, {}

    def call(self, program: Program) -> Any:
        """What the function makes of its inputs, by a program that is found or kept.

        Raises:
            ProgramError: a damaged file.
        """
        return self.ready(program)(*program.inputs.values())

    def ready(self, program: Program) -> Callable[..., Any]:
        """The compiled function, found or compiled and kept.

        Raises:
            ProgramError: a damaged file.
        """
        leaves, structure = jax.tree.flatten(dict(program.inputs))
        at_hand = (program.name, structure, tuple(map(_describe, leaves)))
        if at_hand not in self._ready:
            self._ready[at_hand] = self._prepare(program)
        return self._ready[at_hand]

    def _prepare(self, program: Program) -> Callable[..., Any]:
        identity, inputs = identify(program), tuple(program.inputs.values())
        try:
            compiled = load(self.directory, identity, inputs)
        except FileNotFoundError as reason:
            self._announce(f"compiling {program.name!r}: {reason}")
            compiled = self._compile(program, identity)
        else:
            self._announce(f"{program.name!r} is ready: {self.directory / identity.filename}")
        return compiled

    def compile_for(
        self,
        program: Program,
        devices: Sequence[jax.Device],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Keeps the program of devices that are not there.

        Args:
            program: its inputs are shapes, on `devices` by their shardings.
            devices: stand-ins (`jax.experimental.topologies`).
            options: of XLA.
        """
        identity = identify(program, devices)
        if (self.directory / identity.filename).exists():
            self._announce(f"{program.name!r} is there: {self.directory / identity.filename}")
            return
        where = f"{len(devices)} x {devices[0].device_kind}"
        self._announce(f"compiling {program.name!r} for {where}")
        self._compile(program, identity, options)

    def _compile(self, program, identity, options=None) -> Callable[..., Any]:
        with _without_cache():
            lowered = jax.jit(program.function).lower(*program.inputs.values())
            compiled = lowered.compile(compiler_options=options)
        check_compiled(lowered, compiled)
        path = save(self.directory, identity, compiled)
        self._announce(f"kept {path}, {path.stat().st_size / 2**20:.1f} MiB")
        return compiled
