"""What the change of a LoRA is multiplied by, as PEFT's configurations say it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from dit_jax.interop.claims import check_types, read_object
from dit_jax.interop.tensors import InteropError, TensorFile
from dit_jax.untrusted import shown

PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # in what diffusers saves, of PEFT's configurations
PEFT_PREFIX = "base_model.model."
_PEFT_ALPHA = 8  # its default, of a configuration without lora_alpha


@dataclasses.dataclass(frozen=True)
class Scales:
    """What PEFT's configuration says of scales, beside the tensors; empty where there is none.

    Attributes:
        alpha: of modules that no pattern is for; None, without a configuration: their rank.
        patterns: alpha by the end of a module's name.
        rank_stabilised: whether alpha is divided by the root of the rank.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rank_stabilised: bool = False

    @classmethod
    def of(cls, file: TensorFile, start: str) -> "Scales":
        """Of adapter_config.json beside PEFT's file, or of the metadata that diffusers writes.

        Args:
            file: with the factors.
            start: of the keys in that metadata of one network, as 'transformer.'.

        Raises:
            InteropError: they cannot be read, or are of other changes than those of low rank.
        """
        config = file.path.parent / PEFT_CONFIG
        if text := file.metadata.get(METADATA):
            try:
                values = json.loads(text)
            except (ValueError, RecursionError, TypeError) as error:
                raise InteropError(f"{file.path}: {METADATA} is no JSON") from error
            if not isinstance(values, dict):
                raise InteropError(f"{file.path}: {METADATA} is no table")
            own = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
            return cls._checked(own, f"{file.path} ({METADATA})") if own else cls()
        if not any(name.startswith(PEFT_PREFIX) for name in file.specs):
            return cls()
        if not config.is_file():
            raise InteropError(
                f"{file.path} is of PEFT, whose {PEFT_CONFIG} is not beside it: without it the "
                "scale of the change (lora_alpha) is not known. Give the folder with both"
            )
        return cls._checked(read_object(config, file.path.parent), str(config))

    @classmethod
    def _checked(cls, values: Mapping[str, Any], where: str) -> "Scales":
        numbers, truths = ("lora_alpha",), ("use_dora", "use_rslora", "lora_bias")
        check_types(where, values, numbers=numbers, truths=truths, nullable=(*numbers, *truths))
        kind = values.get("peft_type", "LORA")
        unknown = [name for name in ("use_dora", "lora_bias") if values.get(name)]
        if kind != "LORA" or unknown or values.get("bias", "none") != "none":
            what = shown(kind) if kind != "LORA" else " and ".join(unknown) or "trained biases"
            raise InteropError(f"{where}: {what}: no plain LoRA, which is all that is read here")
        patterns = values.get("alpha_pattern") or {}
        number = (int, float)
        if not isinstance(patterns, dict) or not all(
            isinstance(v, number) and math.isfinite(v) for v in patterns.values()
        ):
            raise InteropError(f"{where}: alpha_pattern: expected numbers by module")
        patterns = {
            key.lstrip("^").rstrip("$").replace("\\.", "."): v for key, v in patterns.items()
        }
        for key in patterns:
            if not all(part.replace("_", "").isalnum() for part in key.split(".")):
                raise InteropError(f"{where}: alpha_pattern has {shown(key)}: expected a module")
        alpha = values.get("lora_alpha")
        alpha = _PEFT_ALPHA if alpha is None else alpha
        return cls(alpha, patterns, bool(values.get("use_rslora")))

    def __call__(self, module: str, rank: int, alpha: float | None) -> float:
        """What the product is multiplied by."""
        if alpha is not None:
            return alpha / rank
        for end, value in self.patterns.items():
            if module == end or module.endswith(f".{end}"):
                alpha = value
                break  # of several that match PEFT takes the first
        if alpha is None:
            alpha = self.alpha
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)
