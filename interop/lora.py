"""LoRA files of PEFT, diffusers, kohya and XLabs, read for any network that has a table of names.

    adapter = load_lora("style.safetensors", network)       # for `models.lora.attach`
    save_lora("mine.safetensors", network, adapter)         # for diffusers' load_lora_weights
    load_loras("style.safetensors", {"transformer": network, "clip": encoder, "t5": encoder_2})

Our fused projections take what are several adapters elsewhere: their a's side by side, their b's in
blocks. What a file holds for modules that the network does not have is an error, never left out.
"""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dit_jax.atomic import atomic_file, atomic_folder, check_destination
from dit_jax.interop import hub
from dit_jax.interop.finiteness import Finiteness, WatchedFile
from dit_jax.interop.lora_names import (
    CLIP,
    T5,
    TRANSFORMER,
    family_of,
    grouped,
    in_first_layer,
    part_of,
    spellings,
)
from dit_jax.interop.lora_scales import PEFT_CONFIG, PEFT_PREFIX, Scales
from dit_jax.interop.lora_targets import Target, export_targets, normalised, targets
from dit_jax.interop.tensors import (
    InteropError,
    TensorFile,
    TensorSpec,
    open_tensors,
    write_safetensors,
)
from dit_jax.models import FluxConfig, Network
from dit_jax.models.lora import Adapter, Factors, layer_shapes
from dit_jax.models.text import TextEncoder
from dit_jax.quantities import counted

PEFT_WEIGHTS = "adapter_model.safetensors"
_TITLES = {CLIP: "CLIP", T5: "T5"}
# What diffusers calls the parts of a pipeline, in a file's metadata.
_METADATA = {TRANSFORMER: "transformer.", CLIP: "text_encoder.", T5: "text_encoder_2."}
_IGNORING = (
    "ignore_text_encoders=True (--lora_ignore_text_encoders) leaves the text encoders as they are"
)


@dataclasses.dataclass(frozen=True)
class _Module:
    """What a file has for one module.

    Attributes:
        name: as the file spells it.
        targets: of it here, several where one adapter changes several modules.
        a: name of the first factor.
        b: of the second.
        alpha: of the scale, if it has one.
    """

    name: str
    targets: tuple[Target, ...]
    a: str
    b: str
    alpha: str | None


def load_lora(
    path: str | os.PathLike,
    network: Network,
    *,
    ignore_text_encoders: bool = False,
    allow_nonfinite: bool = False,
) -> Adapter:
    """Reads an adapter for `network`.

    Args:
        path: a .safetensors file, a .pt file of nothing but tensors, a folder that PEFT or
            diffusers saved, or hub:owner/name[:file].
        network: what it is for.
        ignore_text_encoders: leave out what it changes in text encoders, instead of refusing it.
        allow_nonfinite: read NaN and infinity, with a warning, instead of refusing them.

    Raises:
        InteropError: one error with all that does not match: modules that the network does not
            have, half a pair, other shapes; another family's adapter, which is named; other
            changes than those of low rank (DoRA, LoHa, LoKr); NaN or infinity.
    """
    networks = {TRANSFORMER: network}
    options = {"ignore_text_encoders": ignore_text_encoders, "allow_nonfinite": allow_nonfinite}
    return load_loras(path, networks, **options)[TRANSFORMER]


def load_loras(
    path: str | os.PathLike,
    networks: Mapping[str, Network | TextEncoder],
    *,
    ignore_text_encoders: bool = False,
    allow_nonfinite: bool = False,
) -> dict[str, Adapter]:
    """Reads what a file changes in a pipeline, an adapter for each network that it does change.

    Args:
        path: see `load_lora`.
        networks: 'transformer', and 'clip' and 't5' if text encoders are to be changed, too.
        ignore_text_encoders: leave out what it changes in text encoders, whatever that is.
        allow_nonfinite: see `load_lora`.

    Raises:
        InteropError: see `load_lora`; it changes a text encoder that is none of `networks`.
    """
    path = hub.resolve(str(path)) if str(path).startswith(hub.PREFIX) else Path(path).expanduser()
    if not path.exists():
        raise InteropError(f"{path} does not exist: expected a file or folder of a LoRA")
    file = open_tensors(path, keep_names=True)
    scales = {name: Scales.of(file, _METADATA[name]) for name in networks}
    modules = _modules(file, networks, ignore_text_encoders)
    for owner, own in modules.items():
        _check_once(file, own)
        _check_shapes(file, own, _TITLES.get(owner, "the transformer"))
    seen = Finiteness(allow_nonfinite)
    watched = WatchedFile(file, seen)
    factors = {
        name: _read(watched, own, scales[name], networks[name]) for name, own in modules.items()
    }
    seen.require(file.path)
    for note in seen.note():
        warnings.warn(f"{file.path}: {note}", stacklevel=2)
    return {name: Adapter(own, path.stem) for name, own in factors.items()}


def _modules(
    file: TensorFile, networks: Mapping[str, Network | TextEncoder], ignore_text_encoders: bool
) -> dict[str, list[_Module]]:
    """The file's modules with their places here, by network; refuses what has none."""
    found: dict[str, dict[str, dict[str, str]]] = {name: {} for name in networks}
    unknown: dict[str, list[str]] = {name: [] for name in networks}
    others: dict[str, list[str]] = {}
    strangers, half, modules, ignored = [], [], {}, 0
    for name in file.specs:
        part = part_of(name)
        if part.owner != TRANSFORMER and ignore_text_encoders:
            ignored += 1
            continue
        if part.kind == "other":
            others.setdefault(part.module, []).append(name)
        elif part.owner not in networks:
            strangers.append(name)
        elif part.kind == "none":
            unknown[part.owner].append(name)
        else:
            own = found[part.owner].setdefault(part.module, {})
            if part.kind in own:
                unknown[part.owner].append(name)  # of several adapters in one file
            own.setdefault(part.kind, name)
    for what, names in others.items():
        raise InteropError(
            f"{file.path} is {what}, of which there is no code here: a LoRA has lora_A and lora_B "
            f"(or lora_down and lora_up) and nothing else; found {grouped(names)[0]}"
        )
    for owner, by_module in found.items():
        for module, names in by_module.items():
            places = _find(module, networks[owner])
            if places is None:
                unknown[owner] += [module] if owner == TRANSFORMER else names.values()
            elif "a" not in names or "b" not in names:
                half += names.values()
            else:
                made = _Module(module, places, names["a"], names["b"], names.get("alpha"))
                modules.setdefault(owner, []).append(made)
    if ignored and ignored == len(file.specs):
        raise InteropError(
            f"{file.path} changes nothing but text encoders, which ignore_text_encoders=True "
            "(--lora_ignore_text_encoders) leaves as they are"
        )
    _require_known(file, networks[TRANSFORMER], modules, unknown, half)
    _require_encoders(file, networks, strangers)
    return modules


def _find(module: str, network: Network | TextEncoder) -> tuple[Target, ...] | None:
    known = targets(network)
    for names in spellings(module):
        found = tuple(known.get(normalised(name)) for name in names)
        if None not in found:
            return found
    return None


def _require_known(
    file: TensorFile,
    network: Network,
    modules: Mapping[str, list[_Module]],
    unknown: Mapping[str, list[str]],
    half: list[str],
) -> None:
    title, own = network.config.title, unknown[TRANSFORMER]
    # Modules of blocks beyond the network's depth are this family's, however many they are.
    deeper = [name for name in own if _find(in_first_layer(name), network)]
    family = family_of(file.specs) if len(deeper) < len(own) else None
    has_some = TRANSFORMER in modules or half or deeper
    if not has_some and (own or not modules):
        what = f"it is an adapter of {family}" if family else "none of its tensors is for it"
        some = ", ".join(grouped(own or file.specs)[:8]) or "no factors"
        raise InteropError(f"{file.path} is no LoRA of {title}: {what} (it has {some})")
    problems = [f"  not in the network: {name}" for name in grouped(own)]
    in_texts = [
        f"  not in {encoder}: {name}"
        for owner, encoder in _TITLES.items()
        for name in grouped(unknown.get(owner, ()))
    ]
    problems += in_texts + [f"  half a pair: {name}" for name in grouped(half)]
    if problems:
        what = f" (its names are those of {family})" if family else ""
        raise InteropError(
            f"{file.path} is not, or not only, a LoRA of this network, {title}{what}:\n"
            + "\n".join(problems)
            + (f"\n{_IGNORING}" if in_texts else "")
        )


def _require_encoders(file: TensorFile, networks: Collection[str], strangers: list[str]) -> None:
    if not strangers:
        return
    found = f"{counted(len(strangers), 'tensor')}, as {strangers[0]}"
    if len(networks) == 1:
        raise InteropError(
            f"{file.path} also changes a text encoder ({found}), which is no part of this network: "
            "FluxPipeline.load_lora_weights reads all of it, ignore_text_encoders=True leaves that "
            "out; the rest was trained beside it"
        )
    known = " and ".join(_TITLES[name] for name in networks if name in _TITLES)
    raise InteropError(
        f"{file.path} changes a text encoder that the pipeline does not have ({found}): it has "
        f"{known}. {_IGNORING}"
    )


def _check_once(file: TensorFile, modules: list[_Module]) -> None:
    """Refuses two changes of one module, under the names of two tools."""
    first: dict[str, str] = {}
    for module in modules:
        for target in module.targets:
            other = first.setdefault(target.module, module.name)
            if other != module.name:
                raise InteropError(
                    f"{file.path} changes {target.module} twice, as {other} and as {module.name}: "
                    "expected one pair of factors; give the adapters as files of their own"
                )


def _check_shapes(file: TensorFile, modules: list[_Module], title: str) -> None:
    """Refuses factors that do not go with each other, or with the module."""
    problems = []
    for module in modules:
        a, b = file.specs[module.a].shape, file.specs[module.b].shape
        outs = sum(target.shape[0] for target in module.targets)
        ins = math.prod(module.targets[0].shape[1:])
        fits = len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[0] > 0
        if not fits or math.prod(a[1:]) != ins or math.prod(b) != outs * b[1]:
            problems.append(
                f"  {module.name}: {list(a)} and {list(b)}, expected [r, {ins}] and [{outs}, r]"
            )
        for name in (module.a, module.b):
            if not _is_float(file.specs[name].dtype):
                problems.append(f"  {name} holds {file.specs[name].dtype}, not weights")
        if module.alpha and file.specs[module.alpha].size != 1:
            problems.append(
                f"  {module.alpha} has {file.specs[module.alpha].size} numbers, not one"
            )
    if problems:
        raise InteropError(
            f"{file.path} has factors of other shapes than {title}, so it is for another network "
            f"({counted(len(problems), 'difference')}):\n" + "\n".join(problems)
        )


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat16", "float8"))


def _read(
    file: TensorFile, modules: list[_Module], scales: Scales, network: Network | TextEncoder
) -> dict[str, Factors]:
    """All factors in our layout, float32."""
    shapes = layer_shapes(network)
    pieces: dict[str, dict[int | None, list[Factors]]] = {}
    for module in modules:
        names = [module.a, module.b, *([module.alpha] if module.alpha else [])]
        a, b, *alpha = (np.asarray(array).astype(np.float32) for array in file.read(names))
        rank = a.shape[0]
        scale = scales(module.name, rank, float(alpha[0].reshape(())) if alpha else None)
        a, b = a.reshape(rank, -1), np.float32(scale) * b.reshape(-1, rank)
        start = 0
        for target in module.targets:
            own = b[start : start + target.shape[0]]
            start += target.shape[0]
            width = shapes[target.ours][-1]
            layers = pieces.setdefault(target.ours, {})
            layers.setdefault(target.layer, []).append(target.our_factors(a, own, width))
    return {path: _stacked(shapes[path], layers) for path, layers in pieces.items()}


def _stacked(shape: tuple[int, ...], layers: Mapping[int | None, list[Factors]]) -> Factors:
    """The factors of a stack, those of layers without any zeros."""
    joined = {layer: _side_by_side(parts) for layer, parts in layers.items()}
    rank = max(a.shape[1] for a, _ in joined.values())
    *stack, i, o = shape
    all_a, all_b = np.zeros((*stack, i, rank), np.float32), np.zeros((*stack, rank, o), np.float32)
    for layer, (a, b) in joined.items():
        index = () if layer is None else (layer,)
        all_a[(*index, slice(None), slice(a.shape[1]))] = a
        all_b[(*index, slice(b.shape[0]))] = b
    return all_a, all_b


def _side_by_side(parts: list[Factors]) -> Factors:
    """One pair of factors for the sum of several; equal a's, of what was split, are one again."""
    distinct: list[list[np.ndarray]] = []
    for a, b in parts:
        same = next((pair for pair in distinct if np.array_equal(pair[0], a)), None)
        if same is None:
            distinct.append([a, b])
        else:
            same[1] = same[1] + b
    return np.concatenate([a for a, _ in distinct], 1), np.concatenate([b for _, b in distinct])


def save_lora(
    path: str | os.PathLike,
    network: Network,
    adapter: Adapter,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Writes an adapter for PEFT.

    Of FLUX it is the file that diffusers' `FluxPipeline.load_lora_weights` loads; of other networks
    a folder that `peft.PeftModel.from_pretrained(model, folder)` loads into the original code's
    model.

    Args:
        path: x.safetensors of FLUX, else a folder; it appears whole or not at all.
        network: whose adapter it is.
        adapter: what to write.
        dtype: of the tensors, 'float32', 'bfloat16' or 'float16'.
        overwrite: replace what is there.

    Raises:
        InteropError: it changes no layer, or one that has no name outside; NaN or infinity in the
            factors.
        FileExistsError: `path` exists.
    """
    path, is_flux = Path(path), isinstance(network.config, FluxConfig)
    if (path.suffix == ".safetensors") != is_flux:
        expected = "a file, NAME.safetensors" if is_flux else "the name of a folder"
        raise InteropError(f"{path}: a LoRA of {network.config.title} is {expected}")
    check_destination(path, overwrite=overwrite)
    places = _places(network, adapter)
    if is_flux:
        with atomic_file(path, overwrite=overwrite) as temporary:
            _write(Path(temporary.name), "transformer.", places, adapter, dtype)
        return
    with atomic_folder(path, overwrite=overwrite) as folder:
        rank = _write(folder / PEFT_WEIGHTS, PEFT_PREFIX, places, adapter, dtype)
        values = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
        values["target_modules"] = [target.module for target in places]
        (folder / PEFT_CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def _places(network: Network, adapter: Adapter) -> list[Target]:
    if not adapter.factors:
        raise InteropError("the adapter changes no layer: there is nothing to write")
    places = [target for target in export_targets(network) if target.ours in adapter.factors]
    missing = sorted(set(adapter.factors) - {target.ours for target in places})
    if missing:
        raise InteropError(
            f"the adapter changes {', '.join(missing)}, for which there is no module outside"
        )
    return places


def _write(path: Path, prefix: str, places: list[Target], adapter: Adapter, dtype: str) -> int:
    """Writes the factors, all of one rank, so that no reader has to guess a scale."""
    rank, specs = adapter.rank, {}
    for target in places:
        shapes = (rank, *target.shape[1:]), (target.shape[0], rank, *(1,) * (len(target.shape) - 2))
        for name, shape in zip("AB", shapes, strict=True):
            specs[f"{prefix}{target.module}.lora_{name}.weight"] = TensorSpec(shape, _dtype(dtype))
    seen = Finiteness()
    arrays = seen.watched(specs, _exported(places, adapter, rank, _dtype(dtype)))
    write_safetensors(path, specs, arrays, metadata={"format": "pt"})
    seen.require(path, can_be_allowed=False)
    return rank


def _dtype(dtype: str) -> np.dtype:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InteropError(f"dtype={dtype!r}: expected 'float32', 'bfloat16' or 'float16'")
    return np.dtype(jnp.dtype(dtype))


def _exported(
    places: list[Target], adapter: Adapter, rank: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    for target in places:
        a, b = adapter.factors[target.ours]
        if target.layer is not None:
            a, b = a[target.layer], b[target.layer]
        more = rank - a.shape[1]
        a, b = np.pad(a, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0)))
        for array in target.their_factors(a, b):
            with np.errstate(over="ignore"):  # the writer looks for infinity
                yield np.ascontiguousarray(array.astype(dtype))
