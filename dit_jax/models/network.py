"""The functional face of a network: parameters in, arrays out.

A `flax.nnx` module is split once into its static graph and a plain nested dict of arrays; all the
rest of the library sees only that dict, so states are ordinary pytrees and steps pure functions.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from dit_jax import conditions as conditions_lib
from dit_jax.models import dit, edm, flux, flux_config
from dit_jax.models.apart import take_apart
from dit_jax.models.call import Request, Result
from dit_jax.models.linear import converted_to, products_dtypes, resolve_dtype
from dit_jax.models.quantization import STORED
from dit_jax.models.structure import Structure, module_of, quantize_layers
from dit_jax.options import register

Params = dict[str, Any]

NETWORK_CONFIGS: dict[str, type] = {}
"""Architectures by their name in configs."""
_MODULES: dict[type, type[nnx.Module]] = {}


def register_network(name: str, config: type, module: type[nnx.Module]) -> None:
    """Makes an architecture known under `name`, in configs and to `Network`.

    Args:
        name: as config.model.name.
        config: a frozen dataclass of its shape and execution, perhaps a `NetworkOptions`; its own
            fields made by `options.option` are the keys config.model.<name>.*. With the properties
            `title`, `input_size`, `in_channels`, `conditions`, `feature_shapes`, `feature_kind`
            ('tokens' or 'maps'), `learn_sigma` and `flops_per_example`. If it takes inputs of
            more than one size also `side_multiple` (what both sides are multiples of) and a method
            `at_size`: (height, width) -> the configuration of the same network for such inputs.
        module: created as `module(config, rngs=...)`, called with a `Request`, gives a `Result`.

    Raises:
        ValueError: the name or the configuration is another architecture's.
    """
    known = NETWORK_CONFIGS.get(name, config), _MODULES.get(config, module)
    if known != (config, module):
        raise ValueError(f"a network {name!r} or a {config.__name__} is registered already")
    register("model", name, config)
    NETWORK_CONFIGS[name], _MODULES[config] = config, module


register_network("dit", dit.DiTConfig, dit.DiT)
register_network("song_unet", edm.SongUNetConfig, edm.SongUNet)
register_network("dhariwal_unet", edm.DhariwalUNetConfig, edm.DhariwalUNet)
register_network("flux", flux_config.FluxConfig, flux.Flux)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's architecture as pure functions; hashable, holds no arrays.

    Attributes:
        config: a registered configuration, see `register_network`.
    """

    config: Any

    def __post_init__(self):
        network_name(self.config)  # refuses what is no network's

    def as_computed(self, params: Params) -> Params:
        """`params` with those converted that layers convert at every call, to what they convert to.

        The network computes the same with them: for calling it repeatedly.
        """
        return converted_to(params, self._of_structure(params)[1])

    @property
    def is_apart(self) -> bool:
        """Whether `as_sampled` gives every layer arrays of its own: where the configuration says
        itself, not by 'auto', that layers are unrolled, and which `stacks` it has."""
        return bool(self._stacks) and self.config.layer_loop == "unroll"

    @property
    def _stacks(self) -> tuple[str, ...]:
        return getattr(self.config, "stacks", ())

    def as_sampled(self, params: Params) -> Params:
        """`params` as sampling on GPUs reads them fastest: of unrolled layers each on its own.

        `apply` computes the same with them. Parameters are for inference alone then, and whoever
        goes on to hold those that were given holds them twice.
        """
        if not self.is_apart:
            return params
        return {
            name: take_apart(part) if name in self._stacks else part
            for name, part in params.items()
        }

    def create(self, key: Key[Array, ""]) -> nnx.Module:
        """The module with fresh parameters."""
        return _MODULES[type(self.config)](self.config, rngs=nnx.Rngs(params=key))

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters as a nested dict. Jit it to create them where they will live."""
        return nnx.to_pure_dict(nnx.state(self.create(key), nnx.Param))

    def quantize(self, params: Params) -> Params:
        """Parameters for inference alone, the kernels of quantised products in 8 bits.

        `apply` takes them as it takes those they are of, and gives the same. Jit it.

        Raises:
            ValueError: `config.quantization` stores nothing in 8 bits; they are quantised already.
        """
        if (own := getattr(self.config, "quantization", "none")) not in STORED:
            raise ValueError(
                f"nothing would be quantised: the network's quantization is {own!r}; set it to "
                "'fp8', 'fp8_rowwise' or 'int8'"
            )
        if is_quantized(params):
            raise ValueError("these parameters are quantised already")
        module = quantize_layers(nnx.merge(self.graph(params), params))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def apply(self, params: Params, request: Request) -> Result:
        """Evaluates the network with `params`, of `init`, `quantize` or `lora.attach`.

        Under jit, what follows the last feature map is computed only if `out` is used.

        Raises:
            ConditionError: conditions that the network does not take, or lacks.
            ValueError: a network without feature maps of these numbers.
        """
        conditions_lib.check(self.conditions, request.conditions, request.x.shape[0])
        return nnx.merge(self.graph(params), params)(request)

    def ahead(self, params: Params, t: Array, conditions: Mapping[str, Any]) -> Any:
        """What evaluations at known times compute of these and the conditions alone, at once.

        Args:
            params: as for `apply`.
            t: the network's times of the evaluations [n].
            conditions: of all of them, the batch leading.

        Returns:
            A pytree of leaves [n, b, ...], of which every evaluation is given its own as
            `Request.ahead`; None for networks that have no such thing, or gain nothing by it here.
        """
        if not hasattr(_MODULES[type(self.config)], "ahead"):
            return None
        return nnx.merge(self.graph(params), params).ahead(t, conditions)

    def graph(self, params: Params) -> Any:
        """The module's static graph, which with `params` makes it whole (`nnx.merge`)."""
        return self._of_structure(params)[0]

    @functools.cached_property
    def _structures(self) -> dict[Structure, tuple[Any, dict]]:
        return {}

    def _of_structure(self, params: Params) -> tuple[Any, dict[tuple, Any]]:
        """Graph and `products_dtypes` of parameters of this structure, made once."""
        structure = Structure.of(params)
        if structure not in self._structures:
            module = module_of(self, structure)
            self._structures[structure] = nnx.split(module)[0], products_dtypes(module)
        return self._structures[structure]

    @property
    def conditions(self) -> dict[str, conditions_lib.Condition]:
        """The conditions it takes, by name."""
        return self.config.conditions

    @property
    def num_classes(self) -> int:
        """Number of classes of its label, 0 if it takes none."""
        return getattr(self.config, "num_classes", 0)

    @property
    def feature_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(height, width, channels) of the feature maps there are, from input to output."""
        return self.config.feature_shapes

    @property
    def has_dropout(self) -> bool:
        """Whether dropout keys make a difference."""
        return getattr(self.config, "dropout", 0.0) > 0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one sample."""
        return (*self.config.input_size, self.config.in_channels)

    def blank_tokens(self, batch: int, size: tuple[int, int]) -> Array:
        """Zeros like the activations of a stack of blocks, for inputs of (height, width)."""
        dtype = resolve_dtype(self.config.dtype)
        return jax.numpy.zeros((batch, *self.config.stack_shape(size)), dtype)

    def at_size(self, size: tuple[int, int]) -> "Network":
        """The same network, with the same parameters, for inputs of another (height, width).

        A network takes what sizes it is called with; this is what it is *said* to take, which
        shapes of samples and features and counts of operations follow.

        Raises:
            ValueError: it takes no inputs of this size.
        """
        size = tuple(size)
        if size == self.config.input_size:
            return self
        if not hasattr(self.config, "at_size"):
            raise ValueError(
                f"model.input_size={size}: {self.config.title} takes inputs of "
                f"{self.config.input_size} alone ({type(self.config).__name__} has no at_size)"
            )
        return dataclasses.replace(self, config=self.config.at_size(size))

    @property
    def num_tokens(self) -> int | None:
        """Tokens of an input's image; None for a network of convolutions."""
        if self.config.feature_kind != "tokens":
            return None
        height, width, _ = self.config.feature_shapes[0]
        return height * width

    @property
    def side_multiple(self) -> int:
        """What the height and the width of its inputs are multiples of."""
        return getattr(self.config, "side_multiple", 1)

    @property
    def null_class(self) -> bool:
        """Whether label `num_classes` stands for "no class"."""
        label = self.conditions.get("label")
        return label is not None and label.can_be_dropped

    @property
    def learn_sigma(self) -> bool:
        """Whether the output carries a learned variance besides the prediction."""
        return self.config.learn_sigma

    @property
    def flops_per_example(self) -> float:
        """Floating-point operations of one example's forward pass."""
        return self.config.flops_per_example


def is_quantized(params: Params) -> bool:
    """Whether parameters are of `Network.quantize`."""
    return Structure.of(params).quantized


def network_name(config: Any) -> str:
    """The name under which a configuration's architecture is registered.

    Raises:
        ValueError: it is no network's configuration.
    """
    for name, known in NETWORK_CONFIGS.items():
        if type(config) is known:
            return name
    raise ValueError(
        f"{type(config).__name__} is no network's configuration: expected one of "
        f"{', '.join(known.__name__ for known in NETWORK_CONFIGS.values())}"
    )
