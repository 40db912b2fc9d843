"""LoRA: changes of low rank to a network's linear maps, added to them or folded into them.

Hu et al. 2021, arXiv 2106.09685. A layer's product becomes x W + alpha / r (x A) B. Parameters with
factors tell the network by themselves: `Network.apply` takes them like any others, and so does
`TextEncoder.encode`.

    params = attach(network, params, [(first, 0.8), (second, 0.5)])     # Adapter, weight
    params = merge(params)        # the same function, and no cost
    params = detach(params)       # the network without, instead

Factors are inputs of compiled programs: others for the same layers, of the same rank, are swapped
in without a compilation (`attach(..., rank=, layers=)` makes them so).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dit_jax.models.apart import Apart, is_apart
from dit_jax.models.network import Network, Params
from dit_jax.models.structure import Architecture, linear_layers
from dit_jax.quantities import counted

Factors = tuple[Float[np.ndarray, "*layers i r"], Float[np.ndarray, "*layers r o"]]
LAYERS = {"all": r".*", "attention": r".*\.(qkv|proj|linear1|linear2)"}
"""Choices of layers by name: regular expressions of paths."""
_SHOWN = 20  # of a list in an error


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA of a network, whatever file it came from.

    Attributes:
        factors: (a, b) by the layer's path, 'double_blocks.image.attn.qkv', with a leading axis
            for layers of a stack; alpha / r is folded into b.
        name: for people.
    """

    factors: Mapping[str, Factors]
    name: str = "adapter"

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(a.shape[-1] for a, _ in self.factors.values())


def layer_shapes(network: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the kernels, [*layers, i, o], of the layers that can have a LoRA, by path."""
    return {".".join(map(str, p)): shape for p, shape in linear_layers(network).items()}


def padded_rank(rank: int) -> int:
    """The next power of two, so that ranks that differ a little are one program."""
    return 1 << max(rank - 1, 0).bit_length()


def attach(
    network: Architecture,
    params: Params,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    rank: int | Callable[[int], int] | None = None,
    layers: Collection[str] = (),
    put: Callable[[str, np.ndarray], Any] = lambda path, array: jnp.asarray(array),
) -> Params:
    """Parameters with adapters beside the kernels, instead of those that were there.

    Several adapters are one of concatenated ranks, each times its weight.

    Args:
        network: whose parameters they are, a `Network` or a `TextEncoder`.
        params: with or without factors, quantised or not.
        adapters: with their weights.
        rank: of all layers, filled up with zeros, or what makes it of what a layer needs
            (`padded_rank`); None: that.
        layers: paths of further layers that get factors, zeros where no adapter has any.
        put: (path, array) -> leaf, for instance onto sharded devices.

    Raises:
        ValueError: layers that the network does not have or of other shapes (all are listed), a
            rank too small, a weight that is no number.
    """
    _check(network, adapters, layers)
    shapes = layer_shapes(network)
    wanted = dict.fromkeys(
        [*layers, *(path for adapter, _ in adapters for path in adapter.factors)]
    )
    result = detach(params)
    for path in wanted:
        a, b = _joined(path, shapes[path], adapters, rank)
        result = _with_factors(result, path.split("."), path, a, b, put)
    return result


def _check(network: Architecture, adapters: Sequence[tuple[Adapter, float]], layers) -> None:
    shapes, problems = layer_shapes(network), []
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise ValueError(f"{adapter.name}: weight {weight}: expected a number")
        for path, (a, b) in adapter.factors.items():
            if path not in shapes:
                problems.append(f"  {adapter.name}: {path} is no linear layer of the network")
                continue
            *stack, i, o = shapes[path]
            r = a.shape[-1]
            expected = (*stack, i, r), (*stack, r, o)
            if (a.shape, b.shape) != expected:
                problems.append(
                    f"  {adapter.name}: {path} has factors {a.shape} and {b.shape}, expected "
                    f"{expected[0]} and {expected[1]}"
                )
    problems += [
        f"  {path} is no linear layer of the network" for path in layers if path not in shapes
    ]
    if problems:
        raise ValueError(
            f"a LoRA that is not of this network ({counted(len(problems), 'difference')}):\n"
            + "\n".join(problems)
        )


def _joined(
    path: str,
    shape: tuple[int, ...],
    adapters: Sequence[tuple[Adapter, float]],
    rank: int | Callable[[int], int] | None,
) -> Factors:
    """One layer's factors of all adapters, float32."""
    *stack, i, o = shape
    used = [
        (*adapter.factors[path], weight) for adapter, weight in adapters if path in adapter.factors
    ]
    own = sum(a.shape[-1] for a, _, _ in used)
    total = rank(max(own, 1)) if callable(rank) else max(own, 1) if rank is None else rank
    if own > total:
        raise ValueError(f"rank={rank}: {path} needs {own} for {counted(len(used), 'adapter')}")
    joined_a, joined_b = (
        np.zeros((*stack, i, total), np.float32),
        np.zeros((*stack, total, o), np.float32),
    )
    start = 0
    for a, b, weight in used:
        end = start + a.shape[-1]
        joined_a[..., start:end], joined_b[..., start:end, :] = a, np.float32(weight) * b
        start = end
    return joined_a, joined_b


def _with_factors(tree: Any, names: list[str], path: str, a, b, put) -> Params:
    """`tree` with factors added to the layer at `names`; what is not on the way is shared."""
    if names:
        key = names[0] if names[0] in tree else int(names[0])
        return {**tree, key: _with_factors(tree[key], names[1:], path, a, b, put)}
    dtype = _stored(tree)
    return {
        **tree,
        "lora_a": put(f"{path}.lora_a", a.astype(dtype)),
        "lora_b": put(f"{path}.lora_b", b.astype(dtype)),
    }


def _stored(layer: Mapping[str, Any]) -> np.dtype:
    """What a layer's parameters are stored in; of a quantised kernel, its bias."""
    kernel = layer["kernel"]
    if "kernel_scale" not in layer:
        return kernel.dtype
    return layer["bias"].dtype if "bias" in layer else jnp.dtype(jnp.float32)


def detach(params: Params) -> Params:
    """Parameters without the factors of a LoRA; the rest is shared, not copied."""
    return {
        name: detach(value) if isinstance(value, Mapping) else value
        for name, value in params.items()
        if name not in ("lora_a", "lora_b")
    }


def merge(params: Params) -> Params:
    """Parameters with W + A B in place of W, and no factors: the same function at no cost.

    Sums are float32, kernels keep the dtype they are stored in, and lose what it cannot tell apart.
    Kernels without factors are shared, not copied.

    Raises:
        ValueError: quantised kernels.
    """
    if "lora_a" in params:
        if "kernel_scale" in params:
            raise ValueError(
                "a LoRA cannot be merged into quantised kernels: merge it first and quantise then, "
                "or leave it beside them"
            )
        rest = {name: value for name, value in params.items() if not name.startswith("lora_")}
        return {**rest, "kernel": _changed(params["kernel"], params["lora_a"], params["lora_b"])}
    return {
        name: merge(value) if isinstance(value, Mapping) else value
        for name, value in params.items()
    }


def _changed(kernel: Any, a: Any, b: Any) -> Any:
    """W + A B, of layers with arrays of their own each by itself."""
    a, b = (jnp.asarray(np.asarray(x)) if is_apart(x) else x for x in (a, b))
    if is_apart(kernel):
        return Apart(tuple(_merged(k, a[i], b[i]) for i, k in enumerate(kernel.layers)))
    return _merged(kernel, a, b)


@jax.jit
def _merged(kernel: Array, a: Array, b: Array) -> Array:
    def one(layer):
        kernel, a, b = (array.astype(jnp.float32) for array in layer)
        return (kernel + jnp.matmul(a, b, precision="highest")).astype(layer[0].dtype)

    # One layer at a time: of a large stack in bfloat16 no copy in float32 is made.
    return one((kernel, a, b)) if kernel.ndim == 2 else jax.lax.map(one, (kernel, a, b))


def choose_layers(network: Network, layers: str) -> list[str]:
    """Paths of the layers that are meant.

    Args:
        network: which has them.
        layers: of `LAYERS`, or a regular expression that whole paths match.

    Raises:
        ValueError: no layer matches, or it is no regular expression.
    """
    try:
        pattern = re.compile(LAYERS.get(layers, layers))
    except re.error as error:
        raise ValueError(f"lora.layers={layers!r} is no regular expression: {error}") from error
    known = layer_shapes(network)
    chosen = [path for path in known if pattern.fullmatch(path)]
    if not chosen:
        some = ", ".join([*known][:_SHOWN])
        raise ValueError(
            f"lora.layers={layers!r} matches none of the network's linear layers: expected "
            f"{', '.join(map(repr, LAYERS))} or a regular expression of whole paths, as {some}"
        )
    return chosen


def init(network: Network, key: Key[Array, ""], rank: int, layers: Sequence[str]) -> Params:
    """Fresh factors, float32, as nested parameters without anything else: b is 0, so is the change.

    a is uniform in +-1 / sqrt(i), as PEFT draws it. Jit it.

    Args:
        network: whose layers.
        key: of a.
        rank: of all of them.
        layers: their paths.
    """
    shapes, tree = linear_layers(network), {}
    paths = {".".join(map(str, path)): path for path in shapes}
    for number, name in enumerate(layers):
        *stack, i, o = shapes[paths[name]]
        limit = i**-0.5
        drawn = jax.random.uniform(
            jax.random.fold_in(key, number), (*stack, i, rank), minval=-limit, maxval=limit
        )
        node = tree
        for part in paths[name]:
            node = node.setdefault(part, {})
        node.update(lora_a=drawn, lora_b=jnp.zeros((*stack, rank, o)))
    return tree


def combine(params: Params, factors: Params, scale: float = 1.0) -> Params:
    """`params` with `factors` (of `init`), the change times `scale`; nothing is copied."""
    result = dict(params)
    for name, value in factors.items():
        if name == "lora_b":
            result[name] = value if scale == 1.0 else scale * value
        elif isinstance(value, Mapping):
            result[name] = combine(params[name], value, scale)
        else:
            result[name] = value
    return result


def to_adapter(factors: Params, scale: float = 1.0, name: str = "adapter") -> Adapter:
    """Factors of `init`, or parameters that carry some, as an adapter."""
    found: dict[str, Factors] = {}

    def walk(tree, path):
        if "lora_a" in tree:
            a, b = (np.asarray(tree[key]).astype(np.float32) for key in ("lora_a", "lora_b"))
            found[".".join(path)] = (a, np.float32(scale) * b)
            return
        for key, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, (*path, str(key)))

    walk(factors, ())
    return Adapter(found, name)
