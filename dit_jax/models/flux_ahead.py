"""FLUX's modulations of all evaluations of a sampler, computed before the first one.

They depend on time, guidance scale and the text's vector, not on the image: a sampler knows all of
them before it starts. Their kernels are a quarter of the network's parameters, and with one row a
step they would be read at every step for next to no arithmetic; here they are read once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_jax.models import stack
from dit_jax.target import target_platform

# Evaluations times examples: with many examples a step, a step reads the kernels for all of them,
# and modulations of all steps would take memory (2 MB a row of FLUX.1).
MOST_ROWS = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Modulations:
    """What `adaLN_modulation` of all layers makes of the conditions of an evaluation.

    Attributes:
        text: of the double blocks' texts [b, depth, 6 d].
        image: of their images.
        single: of the single blocks [b, single_depth, 3 d].
        final: of the final layer [b, 2 d].
    """

    text: Any  # before sampling they have a leading axis of evaluations
    image: Any
    single: Any
    final: Any

    def of_layers(self) -> tuple[tuple[Array, Array], Array]:
        """Those of the double blocks, (text, image), and of the single ones, layers leading."""
        text, image, single = (jnp.moveaxis(a, 1, 0) for a in (self.text, self.image, self.single))
        return (text, image), single


def is_worthwhile(rows: int, backend: str | None = None) -> bool:
    """Whether so many rows are computed ahead: on accelerators.

    On CPUs a product of several rows rounds otherwise than of one, and images would change.
    """
    return (backend or target_platform()) != "cpu" and rows <= MOST_ROWS


def modulations_ahead(
    network: nnx.Module, t: Float[Array, " n"], conditions: dict[str, Array]
) -> Modulations | None:
    """The modulations of all layers of a `Flux`.

    Args:
        network: the module.
        t: network times of the evaluations.
        conditions: of all of them.

    Returns:
        Leaves [n, b, ...]; None where that is not worthwhile.
    """
    evaluations, batch = t.shape[0], conditions["pooled"].shape[0]
    if not is_worthwhile(evaluations * batch):
        return None
    told = {name: conditions[name] for name in ("pooled", "guidance") if name in conditions}
    told = {name: jnp.concatenate([value] * evaluations) for name, value in told.items()}
    condition = network.condition(jnp.repeat(t, batch), told)
    config = network.config

    def of_double(block, condition):
        condition, text = _in_turn(condition, block.text.adaLN_modulation(condition))
        condition, image = _in_turn(condition, block.image.adaLN_modulation(condition))
        return condition, (text, image)

    def of_single(block, condition):
        return _in_turn(condition, block.adaLN_modulation(condition))

    options = {"layer_loop": config.layer_loop, "evaluations": evaluations}
    condition, (text, image) = _of_stack(
        network.double_blocks, of_double, condition, config.depth, **options
    )
    condition, single = _of_stack(
        network.single_blocks, of_single, condition, config.single_depth, **options
    )
    final = network.final_layer.adaLN_modulation(condition)
    return Modulations(text, image, single, final.reshape(evaluations, -1, final.shape[-1]))


def _in_turn(condition: Array, made: Array) -> tuple[Array, Array]:
    """Both, the condition only once the other is there.

    Of products with one operand XLA makes a single one, for which it copies their kernels together.
    """
    return jax.lax.optimization_barrier((condition, made))


def _of_stack(
    blocks: nnx.Module,
    modulate: Callable[[nnx.Module, Array], tuple[Array, Any]],
    condition: Array,
    depth: int,
    *,
    layer_loop: str,
    evaluations: int,
) -> tuple[Array, Any]:
    """The condition, and what `modulate` makes in every layer, [evaluations, b, depth, m]."""
    condition, made, _ = stack.run_stack(
        blocks,
        lambda block, condition, _: modulate(block, condition),
        condition,
        state=jnp.arange(depth),
        depth=depth,
        layer_loop=layer_loop,
    )

    def by_evaluation(leaf):
        leaf = leaf.reshape(depth, evaluations, -1, leaf.shape[-1])
        return jnp.moveaxis(leaf, 0, 2)

    return condition, jax.tree.map(by_evaluation, made)
