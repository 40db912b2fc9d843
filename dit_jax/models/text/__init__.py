"""Text encoders: token ids in, states of the tokens out. They are no denoisers."""

from dit_jax.models.text.clip import CLIPText, CLIPTextConfig
from dit_jax.models.text.encoder import TextEncoder, TextStates
from dit_jax.models.text.t5 import T5Config, T5Encoder

__all__ = ["CLIPText", "CLIPTextConfig", "T5Config", "T5Encoder", "TextEncoder", "TextStates"]
