"""The platform that programs are made for: JAX's own backend, unless another one is named.

What 'auto' stands for (kernels, dtypes, loops, backward passes) goes by it. A program for a device
that is not there is traced inside `targeting`:

  with targeting("gpu"):
      lowered = jax.jit(step).lower(shapes)
"""

import contextlib

import jax

from dit_jax.nearest import one_of

PLATFORMS = ("cpu", "gpu", "tpu")
"""As `jax.default_backend` calls them."""

# A part of the key of jit's caches: the same function, traced for another target, is traced anew.
_named = jax.make_user_context(default_value=None)


def targeting(platform: str) -> contextlib.AbstractContextManager:
    """A context in which programs are traced, and networks built, for `platform`.

    Raises:
        ValueError: it is none of `PLATFORMS`.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"target {platform!r}: {one_of(platform, PLATFORMS)}")
    return _named(platform)


def target_platform() -> str:
    """That of the innermost `targeting`, else JAX's default backend."""
    return _named.value or jax.default_backend()
