"""The LoRA adapters of a pipeline: several at hand, some of them in use."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.interop.lora import load_loras
from dit_jax.interop.lora_names import CLIP, T5, TRANSFORMER
from dit_jax.models import Network, lora
from dit_jax.models.text import TextEncoder
from dit_jax.nearest import did_you_mean
from dit_jax.pipelines.divided import Divided
from dit_jax.pipelines.execution import Latents
from dit_jax.pipelines.flux_files import RULES, FluxParts
from dit_jax.pipelines.text import TextPart

Changes = Mapping[str, lora.Adapter]
"""What one LoRA changes, by the name of the network: 'transformer', 'clip', 't5'."""


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A network that adapters change.

    Attributes:
        network: the transformer, or a text encoder.
        params: its parameters, without adapters.
        put: (path, array) -> leaf: where the factors live.
    """

    network: Network | TextEncoder
    params: Any
    put: Callable[[str, np.ndarray], Any] = lambda path, array: jnp.asarray(array)


def adapted_networks(parts: FluxParts, divided: Divided | None) -> dict[str, Adapted]:
    """The networks of a pipeline by name; factors of its text encoders live where these do.

    Args:
        parts: the pipeline's.
        divided: over which devices its weights are divided.
    """
    found = {TRANSFORMER: Adapted(parts.transformer, parts.params)}  # which `Latents` places
    for name, text in ((CLIP, parts.clip), (T5, parts.t5)):
        found[name] = Adapted(text.encoder, text.params)
        if divided is not None:
            found[name] = dataclasses.replace(found[name], put=divided.put(RULES[name]))
        elif isinstance(jax.tree.leaves(text.params)[0], np.ndarray):  # offloaded
            found[name] = dataclasses.replace(found[name], put=lambda path, array: array)
    return found


class Adapters:
    """Adapters by name, and the parameters with those in use beside the kernels.

    All that are at hand are a part of the parameters, those not in use with weight 0, and ranks are
    filled up to a power of two: which are in use, and with what weights, changes values alone, so
    that no program is compiled anew.

    Args:
        networks: by name, 'transformer', 'clip' and 't5'.

    Attributes:
        params: parameters with adapters, by the networks' names; those that no adapter changes are
            the very ones that were given.
        weights: of the adapters in use, by their names.
    """

    def __init__(self, networks: Mapping[str, Adapted]):
        self._networks = dict(networks)
        self._known: dict[str, Changes] = {}
        self.weights: dict[str, float] = {}
        self.params = {name: adapted.params for name, adapted in networks.items()}

    def load(
        self,
        path: str | Path,
        weight: float,
        name: str | None,
        ignore_text_encoders: bool,
        **options: bool,
    ) -> str:
        """Reads one and puts it to use beside those that are; returns its name.

        Args:
            path: see `interop.lora.load_loras`, as what follows the name.
            weight: of what it changes.
            name: None for the file's.
            ignore_text_encoders: leave out what it changes in text encoders.
            options: others.

        Raises:
            InteropError: see `interop.lora.load_loras`.
            ValueError: there is one of this name.
        """
        self._require_new(name)
        networks = {
            part: adapted.network
            for part, adapted in self._networks.items()
            if part == TRANSFORMER or not ignore_text_encoders
        }
        changes = load_loras(path, networks, ignore_text_encoders=ignore_text_encoders, **options)
        return self.add(changes, weight, name)

    def add(self, changes: Changes, weight: float, name: str | None = None) -> str:
        """Puts one to use beside those that are; returns its name.

        Raises:
            ValueError: there is one of this name, or it is of other networks.
        """
        self._require_new(name)
        name = name or self._new_name(next(iter(changes.values())).name)
        self._use({**self._known, name: changes}, {**self.weights, name: float(weight)})
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

    def _use(self, known: Mapping[str, Changes], weights: Mapping[str, float]) -> None:
        params = {}
        for part, adapted in self._networks.items():
            pairs = [
                (changes[part], weights.get(name, 0.0))
                for name, changes in known.items()
                if part in changes
            ]
            params[part] = adapted.params
            if pairs:
                options = {"rank": lora.padded_rank, "put": adapted.put}
                params[part] = lora.attach(adapted.network, adapted.params, pairs, **options)
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
    """What a pipeline that has these offers of adapters.

    Attributes:
        adapters: of its networks.
        latents: which its transformer makes.
        texts: its text encoders, 'clip' and 't5', with the adapters in use.
    """

    adapters: Adapters
    latents: Latents
    texts: dict[str, TextPart]

    def _use_adapters(self) -> None:
        """Goes on with the parameters of the adapters in use."""
        self.latents.replace_params(self.adapters.params[TRANSFORMER])
        for name, text in self.texts.items():
            self.texts[name] = dataclasses.replace(text, params=self.adapters.params[name])

    def load_lora_weights(
        self,
        path: str | Path,
        weight: float = 1.0,
        *,
        adapter_name: str | None = None,
        ignore_text_encoders: bool = False,
        allow_nonfinite: bool = False,
    ) -> str:
        """Reads a LoRA and uses it, beside those in use (docs/lora.md).

        What it changes in CLIP and T5 is used with the same weight. diffusers reads no T5's.

        Args:
            path: a file of PEFT, diffusers, kohya or XLabs, a folder, or hub:owner/name[:file].
            weight: of what it changes.
            adapter_name: for `set_adapters`; default: the file's.
            ignore_text_encoders: leave out what it changes in text encoders.
            allow_nonfinite: read NaN and infinity, with a warning, instead of refusing them.

        Returns:
            Its name.

        Raises:
            InteropError: it does not match the pipeline; all that differs is said.
            ValueError: there is one of this name, or the weight is no number.
        """
        name = self.adapters.load(
            path, weight, adapter_name, ignore_text_encoders, allow_nonfinite=allow_nonfinite
        )
        self._use_adapters()
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
        name = self.adapters.add({TRANSFORMER: adapter}, weight, adapter_name)
        self._use_adapters()
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
        self._use_adapters()

    def unload_lora_weights(self) -> None:
        """Lets go of every LoRA: the pipeline as it was read."""
        self.adapters.remove()
        self._use_adapters()
