"""Matrix products alone, by XLA and by PyTorch: what is left to gain where they are the work.

The shapes are those of a single block of `benchmark_flux.CONFIG`, in and out; each side stores the
weights as its networks do, [in, out] here and [out, in] in PyTorch.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import turns
from benchmark_flux import CONFIG, SIDE, TEXT

TOKENS = (SIDE // CONFIG.patch_size) ** 2 + TEXT
WIDTHS = (
    (CONFIG.hidden_size, 3 * CONFIG.hidden_size + CONFIG.mlp_hidden),
    (CONFIG.hidden_size + CONFIG.mlp_hidden, CONFIG.hidden_size),
)
REPEATS = 6  # as many as there are blocks


def operands(batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens [b l, in], weights [in, out]) of each product."""
    random = np.random.default_rng(0)
    return [
        (
            random.standard_normal((batch_size * TOKENS, width), np.float32),
            random.standard_normal((width, out), np.float32),
        )
        for width, out in WIDTHS
    ]


def jax_products(batch_size: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A function that computes each product `REPEATS` times to its end, and facts about it."""
    pairs = jax.device_put(operands(batch_size))
    multiply = jax.jit(jax.numpy.matmul)

    def run() -> None:
        for tokens, weights in pairs * REPEATS:
            multiply(tokens, weights).block_until_ready()

    work = sum(2 * tokens.size * weights.shape[1] for tokens, weights in pairs)
    return run, {"compile_seconds": 0.0, "flops": REPEATS * work}


def torch_products(batch_size: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The same in PyTorch."""
    import torch

    device = turns.torch_device()
    pairs = [
        (torch.tensor(tokens).to(device), torch.tensor(np.ascontiguousarray(weights.T)).to(device))
        for tokens, weights in operands(batch_size)
    ]

    def run() -> None:
        with torch.no_grad():
            for tokens, weights in pairs * REPEATS:
                torch.nn.functional.linear(tokens, weights)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run, {"compile_seconds": 0.0}
