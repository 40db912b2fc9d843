"""The one place where a layer's matrix product runs, and how parameters start and are stored.

Quantised products (`quantization`) and sharding constraints belong into `product`, which every
network calls, given what is computed (`Precision`) and for whom (a role of `ROLES`). A LoRA is two
more parameters of `Linear` whose product is added before the bias; no layer above has to know of
either.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from dit_jax.models.apart import of_layers
from dit_jax.models.batch_axes import divided_by_examples, is_training_mesh
from dit_jax.models.quantization import (
    STORED,
    quantize_kernel,
    quantized_product,
    require_quantization,
)
from dit_jax.models.recomputation import activation
from dit_jax.nearest import one_of
from dit_jax.target import target_platform

ROLES = ("hidden", "conditioning", "modulation", "embedding", "output")
PARAM_DTYPES = ("auto", "float32", "bfloat16")


def resolve_dtype(dtype: str, backend: str | None = None) -> jnp.dtype:
    """'auto' is bfloat16 on accelerators and float32 on CPUs."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    if dtype == "auto":
        dtype = "float32" if (backend or target_platform()) == "cpu" else "bfloat16"
    return jnp.dtype(dtype)


def resolve_param_dtype(param_dtype: str, stored: str = "float32") -> str:
    """'auto' is `stored`: float32 for fresh parameters, else what a checkpoint's file holds."""
    if param_dtype not in PARAM_DTYPES:
        raise ValueError(f"param_dtype={param_dtype!r}: {one_of(param_dtype, PARAM_DTYPES)}")
    return stored if param_dtype == "auto" else param_dtype


@dataclasses.dataclass(frozen=True)
class Precision:
    """What the products of a network's layers are computed in, and their parameters stored in.

    A role with a dtype of its own computes in it, and stores its parameters in nothing narrower:
    where `storage` is bfloat16, a float32 role keeps float32 parameters. Normalisation, softmax and
    features of time are no products: they are float32 always, parameters included.

    Attributes:
        compute: dtype of the products of every role that names none, 'float32', 'bfloat16' or
            'float16'.
        storage: dtype of their parameters.
        conditioning: of the embedders of time, class and augmentation, EDM's mapping network, and
            what EDM's blocks make of its output.
        modulation: of adaLN's maps from the condition to shifts, scales and gates; '': `compute`.
        embedding: of the patch embedding, or a U-Net's first convolution; '': `compute`.
        output: of the last projection, which feeds the solver and costs next to nothing.
        float32_products: XLA's precision of float32 products: 'default' leaves accelerators their
            faster formats (TF32, bfloat16), 'highest' does not.
        quantization: of the products of `Linear` layers of role 'hidden', one of
            `quantization.QUANTIZATIONS`; those of other roles are never quantised.

    Raises:
        ValueError: an unknown quantisation, or one that this device does not have.
    """

    compute: str = "float32"
    storage: str = "float32"
    conditioning: str = "float32"
    modulation: str = ""
    embedding: str = ""
    output: str = "float32"
    float32_products: str = "default"
    quantization: str = "none"

    def __post_init__(self):
        require_quantization(self.quantization)

    def quantization_of(self, role: str) -> str:
        """How operands of the products of `role` are quantised."""
        return "none" if self._own(role) or role != "hidden" else self.quantization

    def dtype(self, role: str) -> jnp.dtype:
        """In which the products of `role` are computed."""
        return jnp.dtype(self._own(role) or self.compute)

    def stored(self, role: str) -> jnp.dtype:
        """In which the parameters of `role` are stored."""
        own = self._own(role)
        return jnp.promote_types(own, self.storage) if own else jnp.dtype(self.storage)

    def _own(self, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"role {role!r}: {one_of(role, ROLES)}")
        return "" if role == "hidden" else getattr(self, role)


FLOAT32 = Precision()


def precision_of(dtype: str, param_dtype: str, quantization: str = "none") -> Precision:
    """The precision that these keys of a network's configuration mean."""
    compute, storage = resolve_dtype(dtype).name, resolve_param_dtype(param_dtype)
    return Precision(compute, storage, quantization=quantization)


@dataclasses.dataclass(frozen=True)
class Initialization:
    """How a layer starts.

    Attributes:
        mode: 'fan_avg' (Xavier) or 'fan_in' (Kaiming), of mean square `scale` / fan; 'normal', of
            standard deviation `scale`; or 'zeros'.
        scale: of the mode. 0 stands for zeros as well, but draws no key, whereas 'zeros' takes one
            as any mode does: the layers created later depend on which it is.
        random_bias: whether biases are drawn from the weights' range instead of being zero.
        distribution: of the fan modes, 'uniform' or 'truncated_normal'.
    """

    mode: str = "fan_avg"
    scale: float = 1.0
    random_bias: bool = False
    distribution: str = "uniform"

    def kernel(self, rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any = jnp.float32) -> nnx.Param:
        """A kernel whose last two axes are input and output channels, drawn in float32."""
        if self.scale == 0:
            return nnx.Param(jnp.zeros(shape, dtype))
        draw = {
            "zeros": nnx.initializers.zeros_init,
            "normal": lambda: nnx.initializers.normal(self.scale),
        }.get(self.mode, self._by_fan)()
        return nnx.Param(draw(rngs.params(), shape).astype(dtype))

    def _by_fan(self) -> nnx.Initializer:
        return nnx.initializers.variance_scaling(self.scale, self.mode, self.distribution)

    def bias(
        self, rngs: nnx.Rngs, kernel_shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> nnx.Param:
        """The bias that goes with a kernel."""
        shape = kernel_shape[-1:]
        if not self.random_bias or self.scale == 0:
            return nnx.Param(jnp.zeros(shape, dtype))
        limit = math.sqrt(3 * self.scale / math.prod(kernel_shape[:-1]))
        drawn = jax.random.uniform(rngs.params(), shape, minval=-limit, maxval=limit)
        return nnx.Param(drawn.astype(dtype))


XAVIER = Initialization()
ZEROS = Initialization("zeros")


def product(
    x: Float[Array, "*batch i"],
    kernel: Num[Array | np.ndarray, "_ _"],
    precision: Precision = FLOAT32,
    role: str = "hidden",
    scale: Float[Array, " _"] | None = None,
) -> Float[Array, "*batch o"]:
    """x [..., i] kernel [i, o], in the dtype of `role`; what has this dtype is not converted.

    Args:
        x: left operand.
        kernel: right operand; of `quantization.quantize_kernel` if it has a `scale`.
        precision: the network's.
        role: what of it applies.
        scale: of the kernel.
    """
    dtype, multiplication = precision.dtype(role), precision.float32_products
    quantization = precision.quantization_of(role)
    if quantization != "none":
        return quantized_product(x, kernel, scale, quantization, dtype)
    return _unquantized_product(x, kernel, dtype, multiplication)


def _unquantized_product(x: Array, kernel: Any, dtype: jnp.dtype, multiplication: str) -> Array:
    return jnp.matmul(
        x.astype(dtype),
        kernel.astype(dtype),
        precision=None if multiplication == "default" else multiplication,
    )


def low_rank_product(
    x: Float[Array, "*batch i"],
    a: Float[Array, "i r"],
    b: Float[Array, "r o"],
    precision: Precision = FLOAT32,
    role: str = "hidden",
) -> Float[Array, "*batch o"]:
    """(x a) b in the dtype of `role`: what a LoRA adds to a product. It is never quantised.

    Hu et al. 2021 (arXiv 2106.09685), section 4.1; their alpha / r is folded into `b`.
    """
    options = precision.dtype(role), precision.float32_products
    return _unquantized_product(_unquantized_product(x, a, *options), b, *options)


class Linear(nnx.Module):
    """y = x W + b over the last axis; also every 1 x 1 convolution.

    With a LoRA, y = x W + (x `lora_a`) `lora_b` + b (`models.lora`).

    Leading axes are flattened to one before the product: XLA's CPU backend computes the backward
    pass of weight and bias markedly faster that way, and no other backend minds.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rngs: keys of the initial values.
        init: how the parameters start.
        use_bias: whether there is a bias.
        precision: the network's.
        role: what of `precision` applies.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        init: Initialization = XAVIER,
        use_bias: bool = True,
        precision: Precision = FLOAT32,
        role: str = "hidden",
    ):
        shape, stored = (in_features, out_features), precision.stored(role)
        self.kernel = init.kernel(rngs, shape, stored)
        self.bias = init.bias(rngs, shape, stored) if use_bias else None
        self.kernel_scale = nnx.data(None)
        self.lora_a, self.lora_b = nnx.data(None), nnx.data(None)
        self.precision, self.role = precision, role

    def quantize(self) -> None:
        """Stores the kernel as its quantised products read it, if they are: with its scale.

        Such a layer is for inference: 8 bits take no gradients. It may be a stack of layers.
        """
        quantization = self.precision.quantization_of(self.role)
        if quantization not in STORED or self.kernel_scale is not None:
            return
        values, scale = of_layers(
            lambda kernel: quantize_kernel(kernel, quantization), self.kernel.get_value()
        )
        self.kernel, self.kernel_scale = nnx.Param(values), nnx.Param(scale)

    def adapt(self, rank: int = 1) -> None:
        """Gives the layer, or the stack of layers, the factors of a LoRA, zeros."""
        kernel = self.kernel[...]
        *layers, first, last = kernel.shape
        if self.kernel_scale is not None:  # it stands transposed
            first, last = last, first
        self.lora_a = nnx.Param(jnp.zeros((*layers, first, rank)))
        self.lora_b = nnx.Param(jnp.zeros((*layers, rank, last)))

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        """Applies the map in the dtype of its role."""
        # A mesh may divide two of the leading axes: then they cannot become one.
        rows = x if is_training_mesh() else x.reshape(-1, x.shape[-1])
        scale = None if self.kernel_scale is None else self.kernel_scale[...]
        y = product(rows, self.kernel[...], self.precision, self.role, scale)
        if self.lora_a is not None:
            factors = self.lora_a[...], self.lora_b[...]
            y = y + low_rank_product(rows, *factors, self.precision, self.role)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)[(None,) * (y.ndim - 1)]
        return activation(divided_by_examples(y.reshape(*x.shape[:-1], y.shape[-1])))


def products_dtypes(module: nnx.Module) -> dict[tuple, jnp.dtype]:
    """In which dtype layers use parameters that are stored in a wider one, by path in `module`.

    Of `Linear` and whatever else has `precision`, `role`, `kernel` and `bias` like it. Empty where
    nothing is converted, as on CPUs by default.
    """
    found = {}
    for path, layer in nnx.iter_modules(module):
        if not all(hasattr(layer, name) for name in ("precision", "role", "kernel")):
            continue
        names = ("lora_a", "lora_b")
        if layer.precision.quantization_of(layer.role) == "none":
            names = ("kernel", "bias", *names)  # else they are quantised from what is stored
        dtype = layer.precision.dtype(layer.role)
        for name in names:
            parameter = getattr(layer, name, None)
            if parameter is not None and parameter.get_value().dtype.itemsize > dtype.itemsize:
                found[*path, name] = dtype
    return found


def converted_to(parameters: Any, dtypes: dict[tuple, jnp.dtype]) -> Any:
    """Parameters (an nnx state or nested dicts) with those of `products_dtypes` converted."""

    def convert(path, leaf):
        names = tuple(entry.key for entry in path if hasattr(entry, "key"))
        return leaf.astype(dtypes[names]) if names in dtypes else leaf

    return jax.tree_util.tree_map_with_path(convert, parameters)
