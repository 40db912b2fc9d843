"""The commands. They parse, wire rooms together and call; no mathematics here."""

from dit_jax import rooms

rooms.require_installed_name(__name__)
