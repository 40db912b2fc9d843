"""Whole systems, from a prompt to pictures: the parts of one checkpoint put together."""

from dit_jax import rooms

rooms.require_installed_name(__name__)
