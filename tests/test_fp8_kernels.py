"""fp8 products are 8-bit kernels in the program an H100 would run, or it is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.fp8_kernels import (
    PRODUCT_SCOPE,
    WideProductError,
    check_compiled,
    fp8_products,
    require_fp8_kernels,
)
from dit_jax.models import DiTConfig, Network, Request
from dit_jax.models.quantization import quantized_product
from dit_jax.parallel.mesh import AXES
from dit_jax.parallel.partitioning import ShardedPlacement, rules_for
from dit_jax.target import targeting
from tests import h100
from tests.plugin import needs_plugin

DEPTH = 2
CONFIG = DiTConfig(
    image_size=16,
    hidden_size=128,
    depth=DEPTH,
    num_heads=2,
    num_classes=10,
    dtype="bfloat16",
    attention="xla",
    custom_gradients="off",
    layer_loop="scan",
)
PRODUCTS = 4  # of a block: qkv, proj, and the MLP's two

WIDE = f"""
ENTRY %main (a: f8e4m3fn[32,16], b: f8e4m3fn[16,32]) -> bf16[32,32] {{
  %a = f8e4m3fn[32,16]{{1,0}} parameter(0)
  %b = f8e4m3fn[16,32]{{1,0}} parameter(1)
  %x = bf16[32,16]{{1,0}} convert(%a)
  %y = bf16[16,32]{{1,0}} convert(%b)
  %first = bf16[32,32]{{1,0}} dot(%a, %b), metadata={{op_name="jit(f)/{PRODUCT_SCOPE}/first"}}
  %other = bf16[32,32]{{1,0}} dot(%x, %y), metadata={{op_name="jit(f)/other"}}
  ROOT %last = bf16[32,32]{{1,0}} dot(%x, %y), metadata={{op_name="jit(f)/{PRODUCT_SCOPE}/last"}}
}}
"""


def request(batch):
    return Request(
        jnp.zeros((batch, 16, 16, 4)), jnp.zeros(batch), {"label": jnp.zeros(batch, jnp.int32)}
    )


def loss(network):
    return lambda params, request: jnp.square(network.apply(params, request).out).mean()


def text_of(config, *, training=False, stored=False, mesh=(1, 1, 1, 1)):
    """The program of a forward pass, or of the gradients, on a mesh of H100s."""
    network = Network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    if stored:
        params = jax.eval_shape(network.quantize, params)
    devices = np.reshape(h100.devices(int(np.prod(mesh))), mesh)
    automatic = (jax.sharding.AxisType.Auto,) * len(AXES)
    placement = ShardedPlacement(Mesh(devices, AXES, axis_types=automatic), rules_for("dit"))
    params = h100.shapes_on(params, placement.state_shardings(params))
    # (40 images: no activation has as many elements as a weight.)
    inputs = h100.shapes_on(request(40), placement.split)
    function = jax.grad(loss(network)) if training else lambda p, r: network.apply(p, r).out

    def lower():
        with placement.tracing():
            return jax.jit(function).lower(params, inputs)

    return h100.compile_text(lower)


def changed_weights(text):
    """Lines that transpose or convert an array of as many elements as a quantised weight."""
    sizes = {factor * CONFIG.hidden_size**2 for factor in (1, 3, 4)}
    found = []
    for line in text.splitlines():
        rest = line.partition(" = ")[2]
        kind, _, opcode = rest.partition("{")
        shape = kind.partition("[")[2].partition("]")[0]
        size = int(np.prod([int(n) for n in shape.split(",") if n.isdigit()] or [0]))
        if size in sizes and (" transpose(" in opcode or " convert(" in opcode):
            found.append(line.strip())
    return found


@needs_plugin
@pytest.mark.parametrize("quantization", ["fp8", "fp8_rowwise"])
def test_sampling_has_an_8_bit_kernel_a_product_and_nothing_is_done_to_stored_weights(quantization):
    config = dataclasses.replace(CONFIG, quantization=quantization)
    text = text_of(config, stored=True)
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == PRODUCTS
    found = fp8_products(text)
    assert len(found.narrow) == PRODUCTS and not found.wide
    require_fp8_kernels(text)
    assert changed_weights(text) == []
    # The same look does see them where weights are quantised at every call.
    assert changed_weights(text_of(config))


@needs_plugin
@pytest.mark.parametrize(
    ("quantization", "layer_loop", "remat", "mesh"),
    [
        ("fp8", "scan", "none", (1, 1, 1, 1)),
        ("fp8_rowwise", "unroll", "none", (1, 1, 1, 1)),
        ("fp8", "scan", "none", (1, 2, 2, 2)),
        ("fp8_rowwise", "scan", "dots", (2, 2, 1, 1)),
    ],
)
def test_training_has_three_8_bit_kernels_a_product(quantization, layer_loop, remat, mesh):
    config = dataclasses.replace(
        CONFIG, quantization=quantization, layer_loop=layer_loop, remat=remat
    )
    text = text_of(config, training=True, mesh=mesh)
    blocks = DEPTH if layer_loop == "unroll" else 1
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 3 * PRODUCTS * blocks
    require_fp8_kernels(text)


@needs_plugin
def test_a_gpu_without_8_bit_kernels_is_found_out():
    mesh = Mesh(np.array(h100.devices(1, "a100")), ("data",))
    inputs = jax.ShapeDtypeStruct(
        (64, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    product = functools.partial(
        quantized_product, scale=None, quantization="fp8", dtype=jnp.bfloat16
    )
    text = h100.compile_text(lambda: jax.jit(product).lower(inputs, inputs))
    with pytest.raises(WideProductError, match="compiled 1 of 1 products in 16 or 32 bits"):
        require_fp8_kernels(text)


def test_products_that_stayed_wide_are_named():
    found = fp8_products(WIDE)
    assert found.narrow == (f"jit(f)/{PRODUCT_SCOPE}/first",)
    assert found.wide == (f"bf16[32,32] of jit(f)/{PRODUCT_SCOPE}/last",)
    with pytest.raises(WideProductError, match=r"1 of 2 products .*\n  bf16\[32,32\] of .*last"):
        require_fp8_kernels(WIDE)
    with pytest.raises(WideProductError, match="without a single product of 8 bits"):
        require_fp8_kernels("\n".join(line for line in WIDE.splitlines() if "scope" in line))


def test_programs_for_cpus_and_without_fp8_are_not_looked_at(monkeypatch):
    lowered = jax.jit(lambda x: quantized_product(x, x, None, "fp8", jnp.float32)).lower(
        jnp.ones((16, 16))
    )
    compiled = lowered.compile()
    check_compiled(lowered, compiled)  # a CPU's: emulated
    with targeting("gpu"):
        with pytest.raises(WideProductError, match="fp8 was asked for"):
            check_compiled(lowered, compiled)
        plain = jax.jit(lambda x: x @ x).lower(jnp.ones((16, 16)))
        check_compiled(plain, plain.compile())
