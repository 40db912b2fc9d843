"""The LoRA adapters of a pipeline's transformer: several at hand, some of them in use."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.interop.lora import load_lora
from dit_jax.models import Network, lora
from dit_jax.nearest import did_you_mean
from dit_jax.pipelines.execution import Latents


class Adapters:
    """Adapters by name, and the parameters with those in use beside the kernels.

    All that are at hand are a part of the parameters, those not in use with weight 0, and ranks are
    filled up to a power of two: which are in use, and with what weights, changes values alone, so
    that no program is compiled anew.

    Args:
        network: the transformer.
        params: its parameters, without adapters.
    """

    def __init__(self, network: Network, params: Any):
        self._network, self._base = network, params
        self._known: dict[str, lora.Adapter] = {}
        self.weights: dict[str, float] = {}
        self.params = params

    def load(
        self,
        path: str | os.PathLike,
        weight: float,
        name: str | None,
        ignore_text_encoders: bool,
    ) -> str:
        """Reads one and puts it to use beside those that are; returns its name.

        Raises:
            InteropError: see `interop.lora.load_lora`.
            ValueError: there is one of this name.
        """
        self._require_new(name)
        adapter = load_lora(path, self._network, ignore_text_encoders=ignore_text_encoders)
        return self.add(adapter, weight, name)

    def add(self, adapter: lora.Adapter, weight: float, name: str | None = None) -> str:
        """Puts one to use beside those that are; returns its name.

        Raises:
            ValueError: there is one of this name, or it is another network's.
        """
        self._require_new(name)
        name = name or self._new_name(adapter.name)
        self._use({**self._known, name: adapter}, {**self.weights, name: float(weight)})
        return name

    def choose(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Uses these and no others.

        Raises:
            ValueError: one is not at hand, or there are not as many weights.
        """
        for name in names:
            if name not in self._known:
                known = ", ".join(map(repr, self._known)) or "none"
                raise ValueError(
                    f"there is no adapter {name!r}; at hand: {known}"
                    f"{did_you_mean(name, self._known, cutoff=0.7)}"
                )
        if len(names) != len(weights) or len(set(names)) != len(names):
            raise ValueError(
                f"adapters {list(names)} and weights {list(weights)}: expected different adapters, "
                "and a weight for each"
            )
        self._use(self._known, dict(zip(names, map(float, weights), strict=True)))

    def remove(self) -> None:
        """Lets go of all of them."""
        self._use({}, {})

    def _use(self, known: Mapping[str, lora.Adapter], weights: Mapping[str, float]) -> None:
        pairs = [(adapter, weights.get(name, 0.0)) for name, adapter in known.items()]
        params = self._base
        if pairs:
            params = lora.attach(self._network, params, pairs, rank=lora.padded_rank)
        self._known, self.weights, self.params = dict(known), dict(weights), params

    def _require_new(self, name: str | None) -> None:
        if name is not None and name in self._known:
            raise ValueError(f"adapter_name={name!r}: there is one already; choose another name")

    def _new_name(self, name: str) -> str:
        number = 2
        chosen = name
        while chosen in self._known:
            chosen, number = f"{name}_{number}", number + 1
        return chosen


class Adaptable:
    """What a pipeline that has `adapters` and `latents` offers of them."""

    adapters: Adapters
    latents: Latents

    def load_lora_weights(
        self,
        path: str | Path,
        weight: float = 1.0,
        *,
        adapter_name: str | None = None,
        ignore_text_encoders: bool = False,
    ) -> str:
        """Reads a LoRA of the transformer and uses it, beside those in use (docs/lora.md).

        Args:
            path: a file of PEFT, diffusers, kohya or XLabs, a folder, or hub:owner/name[:file].
            weight: of what it changes.
            adapter_name: for `set_adapters`; default: the file's.
            ignore_text_encoders: leave out what it changes in text encoders.

        Returns:
            Its name.

        Raises:
            InteropError: it does not match the transformer; all that differs is said.
            ValueError: there is one of this name, or the weight is no number.
        """
        name = self.adapters.load(path, weight, adapter_name, ignore_text_encoders)
        self.latents.replace_params(self.adapters.params)
        return name

    def add_adapter(
        self, adapter: lora.Adapter, weight: float = 1.0, *, adapter_name: str | None = None
    ) -> str:
        """Uses a LoRA that is at hand, as `interop.lora_runs.open_adapter` reads one of a run.

        Args:
            adapter: of the transformer.
            weight: see `load_lora_weights`, as what follows and is returned.
            adapter_name: see there.

        Raises:
            ValueError: it does not fit the transformer; there is one of this name.
        """
        name = self.adapters.add(adapter, weight, adapter_name)
        self.latents.replace_params(self.adapters.params)
        return name

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | np.number | Sequence[float | np.number] | None = None,
    ) -> None:
        """Uses these of the LoRA that were loaded, and no others; nothing is compiled anew.

        Args:
            adapter_names: one or several.
            adapter_weights: of each, or one for all; default 1.

        Raises:
            ValueError: one was not loaded, or there are not as many weights.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        if np.ndim(weights) == 0:
            weights = [weights] * len(names)
        self.adapters.choose(names, [float(weight) for weight in weights])
        self.latents.replace_params(self.adapters.params)

    def unload_lora_weights(self) -> None:
        """Lets go of every LoRA: the pipeline as it was read."""
        self.adapters.remove()
        self.latents.replace_params(self.adapters.params)
