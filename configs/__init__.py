"""Experiments, one file each: `get_config()` returns an ml_collections configuration."""

from dit_jax import rooms

if __name__ == "configs":  # as files of users say
    rooms.answer_to_former_name(__name__)
