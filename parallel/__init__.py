"""Many devices: meshes, placement of states and batches."""

from dit_jax import rooms

rooms.require_installed_name(__name__)
