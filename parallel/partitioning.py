"""Where the parameters of each architecture live: tables of path patterns and mesh axes.

A rule names the mesh axes of a parameter's trailing dimensions; leading ones (the layers of a
stack) stay whole, so that a scan over layers gathers one layer at a time. The pattern is searched
for at the end of a parameter's path. Averages, optimizer states and the other players of a method
have paths that end in the parameter's own, and so follow it.

A matrix that is multiplied first in a pair (queries, the first layer of an MLP, the first
convolution of a block) is divided by columns over 'tensor', the second by rows (Megatron-LM,
Shoeybi et al. 2019, section 3); 'fsdp' takes the other dimension (ZeRO-3, Rajbhandari et al. 2020).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.models.quantization import STORED_DTYPES
from dit_jax.parallel.mesh import DataParallel, put_whole
from dit_jax.tree_paths import path_of

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Rule:
    """Mesh axes of the parameters whose path ends in `pattern`.

    Attributes:
        pattern: regular expression of whole path components.
        axes: one entry a trailing dimension: a mesh axis, several, or None.
        optional: whether some configurations have no such parameter.
    """

    pattern: str
    axes: tuple[Axes, ...]
    optional: bool = False

    def matches(self, path: str) -> bool:
        """Whether this rule is meant for the parameter `path`, and for what follows it."""
        return re.search(f"(^|/)(?:{self.pattern})$", path) is not None


BOTH = ("tensor", "fsdp")
COLUMNS = ("fsdp", "tensor")
ROWS = ("tensor", "fsdp")
VECTOR = (BOTH,)
IMAGE_COLUMNS = (None, None, "fsdp", "tensor")  # of convolutions [height, width, in, out]
IMAGE_ROWS = (None, None, "tensor", "fsdp")

DIT = (
    Rule(r"blocks/attn/qkv/kernel", COLUMNS),
    Rule(r"blocks/attn/proj/kernel", ROWS),
    Rule(r"blocks/mlp/fc1/kernel", COLUMNS),
    Rule(r"blocks/mlp/fc2/kernel", ROWS),
    Rule(r"blocks/adaLN_modulation/kernel", COLUMNS),
    Rule(r"blocks/.*/bias", VECTOR),
    Rule(r"x_embedder/kernel", (None, BOTH)),
    Rule(r"x_embedder/bias", VECTOR),
    Rule(r"t_embedder/fc1/kernel", COLUMNS),
    Rule(r"t_embedder/fc2/kernel", ROWS),
    Rule(r"t_embedder/fc\d/bias", VECTOR),
    Rule(r"r_embedder/fc1/kernel", COLUMNS, optional=True),
    Rule(r"r_embedder/fc2/kernel", ROWS, optional=True),
    Rule(r"r_embedder/fc\d/bias", VECTOR, optional=True),
    Rule(r"y_embedder/embedding", (None, BOTH), optional=True),
    Rule(r"augment_embedder/kernel", (None, BOTH), optional=True),
    Rule(r"final_layer/adaLN_modulation/kernel", COLUMNS),
    Rule(r"final_layer/linear/kernel", (BOTH, None)),
    Rule(r"final_layer/.*/bias", VECTOR),
)

FLUX = (
    Rule(r"double_blocks/(image|text)/attn/qkv/kernel", COLUMNS),
    Rule(r"double_blocks/(image|text)/attn/proj/kernel", ROWS),
    Rule(r"double_blocks/(image|text)/mlp/fc1/kernel", COLUMNS),
    Rule(r"double_blocks/(image|text)/mlp/fc2/kernel", ROWS),
    Rule(r"single_blocks/linear1/kernel", COLUMNS),
    Rule(r"single_blocks/linear2/kernel", ROWS),
    Rule(r"(double_blocks/(image|text)|single_blocks)/adaLN_modulation/kernel", COLUMNS),
    Rule(r"(double|single)_blocks/.*/(query|key)_norm/scale", (None,)),  # of the size of a head
    Rule(r"(double|single)_blocks/.*/bias", VECTOR),
    Rule(r"(x|text)_embedder/kernel", (None, BOTH)),
    Rule(r"(x|text)_embedder/bias", VECTOR),
    Rule(r"(t|pooled)_embedder/fc1/kernel", COLUMNS),
    Rule(r"(t|pooled)_embedder/fc2/kernel", ROWS),
    Rule(r"(t|pooled)_embedder/fc\d/bias", VECTOR),
    Rule(r"guidance_embedder/fc1/kernel", COLUMNS, optional=True),
    Rule(r"guidance_embedder/fc2/kernel", ROWS, optional=True),
    Rule(r"guidance_embedder/fc\d/bias", VECTOR, optional=True),
    Rule(r"final_layer/adaLN_modulation/kernel", COLUMNS),
    Rule(r"final_layer/linear/kernel", (BOTH, None)),
    Rule(r"final_layer/.*/bias", VECTOR),
)

UNET = (
    Rule(r"(enc|dec)/\w+/conv0/kernel", IMAGE_COLUMNS),
    Rule(r"(enc|dec)/\w+/conv1/kernel", IMAGE_ROWS),
    Rule(r"(enc|dec)/\w+/skip/kernel", COLUMNS, optional=True),
    Rule(r"(enc|dec)/\w+/affine/kernel", COLUMNS),
    Rule(r"(enc|dec)/\w+/qkv/kernel", COLUMNS, optional=True),
    Rule(r"(enc|dec)/\w+/proj/kernel", ROWS, optional=True),
    Rule(r"enc/\w+_conv/kernel", (None, None, None, BOTH)),
    Rule(r"enc/\w+_aux_residual/kernel", (None, None, None, BOTH), optional=True),
    Rule(r"enc/\w+_aux_skip/kernel", (None, BOTH), optional=True),
    Rule(r"dec/\w+_aux_conv/kernel", (None, None, BOTH, None), optional=True),
    Rule(r"out_conv/kernel", (None, None, BOTH, None), optional=True),
    Rule(r"(enc|dec)/.*(bias|scale)", VECTOR),
    Rule(r"out_(conv|norm)/(bias|scale)", VECTOR, optional=True),
    Rule(r"map_layer0/kernel", COLUMNS),
    Rule(r"map_layer1/kernel", ROWS, optional=True),
    Rule(r"map_(layer\d|label)/bias", VECTOR),
    Rule(r"map_(label|augment)/kernel", (None, BOTH), optional=True),
    Rule(r"map_second_time/layer\d/kernel", COLUMNS, optional=True),
    Rule(r"map_second_time/(label|augment)/kernel", (None, BOTH), optional=True),
    Rule(r"map_second_time/\w+/bias", VECTOR, optional=True),
    Rule(r"(map_|map_second_time/)noise/freqs", VECTOR, optional=True),
)

VAE = (
    Rule(r"(encoder|decoder)/.*/conv1/kernel", IMAGE_COLUMNS),
    Rule(r"(encoder|decoder)/.*/conv2/kernel", IMAGE_ROWS),
    Rule(r"(encoder|decoder)/.*/conv_shortcut/kernel", COLUMNS, optional=True),
    Rule(r"(encoder|decoder)/.*/resample/conv/kernel", IMAGE_COLUMNS, optional=True),
    Rule(r"(encoder|decoder)/.*/to_[qkv]/kernel", COLUMNS, optional=True),
    Rule(r"(encoder|decoder)/.*/to_out/kernel", ROWS, optional=True),
    Rule(r"(encoder|decoder)/conv_in/kernel", (None, None, None, BOTH)),
    Rule(r"(encoder|decoder)/conv_out/kernel", (None, None, BOTH, None)),
    Rule(r"(encoder|decoder)/.*(bias|scale)", VECTOR),
    Rule(r"(post_)?quant_conv/kernel", (None, BOTH), optional=True),
    Rule(r"(post_)?quant_conv/bias", VECTOR, optional=True),
)

CLIP_TEXT = (
    Rule(r"(token|position)_embedding/embedding", (None, BOTH)),
    Rule(r"blocks/attn/qkv/kernel", COLUMNS),
    Rule(r"blocks/attn/proj/kernel", ROWS),
    Rule(r"blocks/mlp/fc1/kernel", COLUMNS),
    Rule(r"blocks/mlp/fc2/kernel", ROWS),
    Rule(r"blocks/.*(bias|scale)", VECTOR),
    Rule(r"final_norm/(bias|scale)", VECTOR),
    Rule(r"text_projection/kernel", COLUMNS, optional=True),
)

T5_ENCODER = (
    Rule(r"token_embedding/embedding", (None, BOTH)),
    Rule(r"relative_bias/embedding", (None, "tensor")),  # a column a head
    Rule(r"blocks/attn/qkv/kernel", COLUMNS),
    Rule(r"blocks/attn/proj/kernel", ROWS),
    Rule(r"blocks/mlp/wi_\d/kernel", COLUMNS),
    Rule(r"blocks/mlp/wo/kernel", ROWS),
    Rule(r"blocks/norm\d/scale", VECTOR),
    Rule(r"final_norm/scale", VECTOR),
)

# The small trees that methods of distillation train beside a network.
PLAYERS = (
    Rule(r"heads/\w+/(convs/)?conv\d*/kernel", (None, None, "tensor", "fsdp"), optional=True),
    Rule(r"heads/\w+/(convs/)?conv\d*/(bias|norm_bias|norm_scale)", VECTOR, optional=True),
    Rule(r"heads/\w+/logit/kernel", (None, None, BOTH, None), optional=True),
    Rule(r"heads/\w+/logit/bias", (None,), optional=True),
    Rule(r"adaptive_weight/.*kernel", VECTOR, optional=True),
    Rule(r"ratio/.*means", (None,), optional=True),
)

TABLES: dict[str, tuple[Rule, ...]] = {
    "dit": DIT,
    "flux": FLUX,
    "song_unet": UNET,
    "dhariwal_unet": UNET,
    "autoencoder_kl": VAE,
    "clip_text": CLIP_TEXT,
    "t5_encoder": T5_ENCODER,
}


# What a path ends in where a stack's layers have arrays of their own (`models.apart`).
_OF_LAYER = re.compile(r"/layers/\d+$")


class RuleError(ValueError):
    """A table of rules and the parameters of a model that do not belong together."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where one array lives.

    Attributes:
        path: of the array in the state.
        shape: of the whole array.
        itemsize: bytes an element.
        spec: mesh axes of its dimensions.
        note: how this departs from its rule, '' if it does not.
    """

    path: str
    shape: tuple[int, ...]
    itemsize: int
    spec: PartitionSpec
    note: str = ""

    def bytes_per_device(self, sizes: dict[str, int]) -> int:
        """What of it one device holds."""
        names = [name for entry in self.spec for name in _names(entry)]
        return math.prod(self.shape) * self.itemsize // math.prod(sizes[name] for name in names)


def place_tree(
    tree: Any, rules: Iterable[Rule], sizes: dict[str, int], *, complete: bool = True
) -> list[Placed]:
    """Where every leaf of `tree` lives, in its order.

    Args:
        tree: of arrays or shapes.
        rules: the first that matches counts; scalars, arrays that are no tree's, and scales of
            quantised kernels need none: they are whole. The factors of a LoRA follow their layer's
            kernel, `lora_a` in its inputs and `lora_b` in its outputs.
        sizes: of the mesh axes.
        complete: refuse a rule that matches nothing, unless it is optional.

    Raises:
        RuleError: naming the parameters that no rule matches, and the rules that match none.
    """
    rules = tuple(rules)
    used, unknown, placed, factors_alone = set(), [], [], True
    for entries, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = _OF_LAYER.sub("", path_of(entries))
        if not leaf.ndim or not path or path.endswith("/kernel_scale"):
            placed.append(Placed(path, leaf.shape, leaf.dtype.itemsize, PartitionSpec()))
            continue
        owner = re.sub(r"/lora_[ab]$", "/kernel", path)
        factors_alone = factors_alone and owner != path
        matching = [rule for rule in rules if rule.matches(owner)]
        if not matching:
            unknown.append(f"  {path} {leaf.shape}")
            continue
        used.update(matching)
        axes = _factor_axes(path, matching[0].axes)
        if leaf.dtype in STORED_DTYPES:  # a quantised kernel stands transposed
            axes = (*axes[:-2], axes[-1], axes[-2])
        spec, note = resolve_spec(path, leaf.shape, axes, sizes)
        placed.append(Placed(path, leaf.shape, leaf.dtype.itemsize, spec, note))
    idle = [f"  {rule.pattern}" for rule in rules if not rule.optional and rule not in used]
    if placed and factors_alone:
        idle = []
    problems = []
    if unknown:
        problems += ["no partition rule matches these parameters:", *unknown]
    if complete and idle:
        problems += ["these partition rules match no parameter:", *idle]
    if problems:
        raise RuleError("\n".join([*problems, "Mend the table in parallel/partitioning.py"]))
    return placed


def _factor_axes(path: str, axes: tuple[Axes, ...]) -> tuple[Axes, ...]:
    """Of a LoRA's factor: those of its kernel, the rank whole."""
    if path.endswith("/lora_a"):
        return (axes[-2], None)
    return (None, axes[-1]) if path.endswith("/lora_b") else axes


def resolve_spec(
    path: str, shape: tuple[int, ...], axes: tuple[Axes, ...], sizes: dict[str, int]
) -> tuple[PartitionSpec, str]:
    """The mesh axes of an array's dimensions, and a note where they are not as the rule says.

    An axis that does not divide its dimension goes to the largest other dimension of the rule that
    it does divide, else the array is whole along it. Axes of one device are left out.

    Raises:
        RuleError: the array has fewer dimensions than the rule.
    """
    if len(axes) > len(shape):
        raise RuleError(f"{path} {shape} has fewer dimensions than its partition rule, {axes}")
    first = len(shape) - len(axes)
    chosen: list[list[str]] = [[] for _ in shape]
    homeless = []

    def fits(dimension: int, name: str) -> bool:
        parts = math.prod(sizes[other] for other in chosen[dimension]) * sizes[name]
        return shape[dimension] % parts == 0

    for dimension, entry in enumerate(axes, first):
        for name in _names(entry):
            if sizes.get(name, 1) == 1:
                continue
            if fits(dimension, name):
                chosen[dimension].append(name)
            else:
                homeless.append((name, dimension))
    notes = []
    for name, wanted in homeless:
        others = sorted(set(range(first, len(shape))) - {wanted}, key=lambda d: -shape[d])
        found = next((d for d in others if fits(d, name)), None)
        if found is None:
            notes.append(f"{shape[wanted]} is not divisible by {name}={sizes[name]}: whole")
        else:
            chosen[found].append(name)
            notes.append(f"{shape[wanted]} is not divisible by {name}={sizes[name]}: moved")
    entries = [tuple(names) if len(names) > 1 else (names or [None])[0] for names in chosen]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries), "; ".join(notes)


def _names(entry: Axes) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


@dataclasses.dataclass(frozen=True)
class ShardedPlacement(DataParallel):
    """States divided over the devices by rules, batches over 'data' and 'fsdp'.

    Attributes:
        rules: of the network's parameters, and of the small trees beside them.
    """

    rules: tuple[Rule, ...] = ()

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    def table(self, abstract_state: Any) -> list[Placed]:
        """Where every array of a state lives.

        Raises:
            RuleError: see `place_tree`.
        """
        return place_tree(abstract_state, self.rules, self._sizes)

    def state_shardings(self, abstract_state: Any) -> Any:
        """A sharding for every leaf, by the rules.

        Raises:
            RuleError: see `place_tree`.
        """
        if isinstance(abstract_state, (jax.ShapeDtypeStruct, jax.Array)):  # a key
            return self.replicated
        shardings = [NamedSharding(self.mesh, p.spec) for p in self.table(abstract_state)]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), shardings)

    def put_params(self, path: str, array: Any) -> jax.Array:
        """One parameter of a network, read from a file, each device given its part alone.

        Args:
            path: its parts joined by slashes, or by points as readers of files have them.
            array: in host memory.
        """
        leaf = {path.replace(".", "/"): jax.ShapeDtypeStruct(array.shape, array.dtype)}
        (placed,) = place_tree(leaf, self.rules, self._sizes, complete=False)
        return put_whole(array, NamedSharding(self.mesh, placed.spec))


def register_rules(model_name: str, rules: tuple[Rule, ...]) -> None:
    """Makes the table of an architecture known, under its name in configs.

    Raises:
        RuleError: there is another one.
    """
    if TABLES.get(model_name, rules) != rules:
        raise RuleError(f"there are partition rules for {model_name!r} already")
    TABLES[model_name] = rules


def rules_for(model_name: str) -> tuple[Rule, ...]:
    """The table of a configuration's model, and of what methods train beside it.

    Raises:
        RuleError: there is none.
    """
    if model_name not in TABLES:
        raise RuleError(
            f"config.model.name={model_name!r} has no partition rules; there are some for "
            f"{', '.join(TABLES)}"
        )
    return TABLES[model_name] + PLAYERS


def format_table(placed: list[Placed], sizes: dict[str, int], *, limit: int = 0) -> str:
    """Path, shape, mesh axes and bytes a device of every array, and their sum.

    Args:
        placed: of `place_tree`.
        sizes: of the mesh axes.
        limit: of lines, 0 for none.
    """
    held = [p.bytes_per_device(sizes) for p in placed]
    rows = [
        (p.path, "x".join(map(str, p.shape)), _format_spec(p.spec), f"{size:,}", p.note)
        for p, size in zip(placed, held, strict=True)
    ]
    if limit and len(rows) > limit:
        rows = [*rows[:limit], (f"... {len(rows) - limit} more", "", "", "", "")]
    rows.insert(0, ("array", "shape", "mesh axes", "bytes a device", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    whole = sum(math.prod(p.shape) * p.itemsize for p in placed)
    parts = math.prod(sizes.values())
    lines.append(
        f"{sum(held):,} bytes a device of {whole:,} in all, {sum(held) / max(whole, 1):.1%} "
        f"(on {parts} devices; divided evenly {1 / parts:.1%})"
    )
    return "\n".join(lines)


def _format_spec(spec: PartitionSpec) -> str:
    return ", ".join("x".join(_names(entry)) or "-" for entry in spec) or "whole"
