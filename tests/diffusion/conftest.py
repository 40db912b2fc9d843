"""A bounded, nonlinear denoiser, written once for NumPy (float64) and JAX; noise levels afresh."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import DDPM, Prediction, RectifiedFlow

MIXING = np.random.default_rng(7).normal(size=(2, 2))


def alpha_sigma(process, t):
    """alpha and sigma at (whole, for DDPM) times, in float64 and from scratch."""
    t = np.asarray(t, np.float64)
    if isinstance(process, DDPM):
        betas = np.linspace(process.beta_start, process.beta_end, process.num_timesteps)
        kept = np.append(np.cumprod(1 - betas), 1.0)[t.astype(int)]  # index -1 is clean data
        return np.sqrt(kept), np.sqrt(1 - kept)
    if isinstance(process, RectifiedFlow):
        return 1 - t, t
    return np.ones_like(t), t


def toy(x, alpha, sigma, xp):
    """(x0, eps, variance fraction) that a toy network says about x."""
    x0 = xp.tanh(x / xp.sqrt(alpha**2 + sigma**2) @ xp.asarray(MIXING, dtype=x.dtype))
    return x0, (x - alpha * x0) / sigma, 0.5 + 0.6 * xp.sin(5 * x0)


@pytest.fixture(scope="session")
def toy_denoise():
    """process -> denoise(x, t, carry) that counts its evaluations in the carry."""

    def build(process, variance=False):
        def denoise(x, t, carry):
            sigma = jnp.maximum(process.sigma(t), 1e-12)
            x0, eps, fraction = toy(x, process.alpha(t), sigma, jnp)
            carry = None if carry is None else carry + 1
            return Prediction(x0, eps, fraction if variance else None), carry

        return denoise

    return build


@pytest.fixture(scope="session")
def reference():
    """The NumPy side: (alpha_sigma, toy network in float64)."""

    def network(process, x, t):
        alpha, sigma = alpha_sigma(process, t)
        return toy(x, alpha, sigma, np)

    return alpha_sigma, network
