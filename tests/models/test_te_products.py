"""Products by Transformer Engine: what is asked of the library, and what is said where it is not.

The library is not there without a GPU: a module stands for it, which takes its arguments and
computes what its quantisers of current scaling do.
"""

import enum
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.fp8_kernels import WideProductError, fp8_products, require_fp8_kernels
from dit_jax.models import DiTConfig, Network, Request, te_products
from dit_jax.models.quantization import E4M3, quantize, require_quantization
from dit_jax.target import targeting


class ScalingMode(enum.Enum):
    CURRENT_TENSOR_SCALING = enum.auto()


class QuantizerFactory:
    @staticmethod
    def create_set(*, scaling_mode, fwd_dtype, bwd_dtype):
        assert scaling_mode is ScalingMode.CURRENT_TENSOR_SCALING
        return fwd_dtype, bwd_dtype


@jax.custom_vjp
def _dense(x, kernel):
    def rounded(a):
        values, scale = quantize(a, E4M3, (0, 1))
        return values.astype(jnp.float32) * scale

    return (rounded(x) @ rounded(kernel)).astype(x.dtype)


_dense.defvjp(
    lambda x, kernel: (_dense(x, kernel), (x, kernel)),
    # As the library's, in the dtype of the operands, whatever the cotangent's.
    lambda saved, dy: ((dy @ saved[1].T).astype(dy.dtype), (saved[0].T @ dy).astype(dy.dtype)),
)


@pytest.fixture
def library(monkeypatch):
    calls = []

    def dense(x, kernel, *, quantizer_set):
        assert x.ndim == 2 and x.dtype == kernel.dtype
        assert quantizer_set == (jnp.float8_e4m3fn, jnp.float8_e5m2)
        calls.append((x.shape, kernel.shape))
        return _dense(x, kernel)

    package = types.ModuleType("transformer_engine")
    package.jax = types.ModuleType(te_products.PACKAGE)
    modules = {
        "transformer_engine": package,
        te_products.PACKAGE: package.jax,
        f"{te_products.PACKAGE}.dense": types.SimpleNamespace(dense=dense),
        f"{te_products.PACKAGE}.quantize": types.SimpleNamespace(
            ScalingMode=ScalingMode, QuantizerFactory=QuantizerFactory
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture
def one_gpu(monkeypatch):
    class Device:
        device_kind, compute_capability = "NVIDIA H100 80GB HBM3", "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_the_products_of_blocks_are_the_librarys(library, one_gpu):
    config = DiTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=4,
        layer_loop="unroll",
        quantization="te",
        dtype="bfloat16",
        attention="einsum",
        custom_gradients="off",
    )
    with targeting("cpu"):
        plain = Network(DiTConfig(**{**vars(config), "quantization": "none"}))
    network = Network(config)
    params = plain.init(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), params)
    request = Request(jnp.ones((2, 8, 8, 4)), jnp.ones(2), {"label": jnp.zeros(2, jnp.int32)})
    out = network.apply(params, request).out
    sides = [(32, 96), (32, 32), (32, 128), (128, 32)]  # of a block, which is traced once
    assert library == [((32, i), (i, o)) for i, o in sides]
    exact = plain.apply(params, request).out
    assert 0 < jnp.abs(out - exact).max() < 0.2 * jnp.abs(exact).max()
    gradient = jax.grad(lambda p: jnp.square(network.apply(p, request).out).sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match=r"nothing would be quantised: .* is 'te'"):
        network.quantize(params)


def test_sides_that_the_kernels_do_not_take(library):
    message = "a product of 10 tokens, 32 by 16 channels; its kernels take multiples of 16"
    with pytest.raises(ValueError, match=message):
        te_products.te_product(jnp.ones((2, 5, 32)), jnp.ones((32, 16)), jnp.bfloat16)


def test_where_there_is_no_library_or_no_gpu(monkeypatch):
    with pytest.raises(ValueError, match=r"and this is a CPU; set model.quantization='fp8'"):
        require_quantization("te")
    with targeting("gpu"), pytest.raises(ValueError, match="a GPU that is not there"):
        require_quantization("te")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match=f"for one GPU, and there are {jax.device_count()}"):
        require_quantization("te")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"pip install 'dit-jax\[te\]'.* No module named"):
        require_quantization("te")
    monkeypatch.setenv("NVTE_JAX_CUSTOM_CALLS", "false")
    with pytest.raises(ValueError, match="switches Transformer Engine's kernels off"):
        require_quantization("te")


CALL = """
ENTRY %main (a: f8e4m3fn[32,16], s: f32[1], b: f8e4m3fn[16,32]) -> (bf16[32,32], u8[64]) {
  %a = f8e4m3fn[32,16]{1,0} parameter(0)
  %s = f32[1]{0} parameter(1)
  %b = f8e4m3fn[16,32]{1,0} parameter(2)
  ROOT %y = (bf16[32,32]{1,0}, u8[9]) custom-call(%a, %s, %b), custom_call_target="te_gemm_v2_ffi"
}
"""


def test_the_librarys_products_are_looked_for_in_the_program():
    assert fp8_products(CALL).narrow == ("te_gemm_v2_ffi",)
    require_fp8_kernels(CALL)
    with pytest.raises(WideProductError, match="1 of 1 products in 16 or 32 bits"):
        require_fp8_kernels(CALL.replace("%b = f8e4m3fn", "%b = bf16"))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="Transformer Engine needs a GPU")
def test_the_library_itself():
    pytest.importorskip("transformer_engine.jax")
    x, kernel = (
        jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
        for shape in ((64, 32), (32, 48))
    )
    found = jax.jit(lambda x, w: te_products.te_product(x, w, jnp.bfloat16))(x, kernel)
    exact = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
    assert jnp.abs(found - exact).max() < 0.1 * jnp.abs(exact).max()
