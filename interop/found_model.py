"""A model on disk that was opened: what it is, and its parameters one by one."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from dit_jax import experiment
from dit_jax.interop.finiteness import Finiteness
from dit_jax.interop.parameters import parameter_dtypes, unflatten
from dit_jax.models import Network


@dataclasses.dataclass(frozen=True)
class FoundModel:
    """A model on disk: what it is, and its parameters one by one.

    Attributes:
        kind: one of `kinds.KINDS`.
        path: where it is.
        config: a resolved configuration whose model and process are the file's.
        read: (path, dtype) -> our parameter of that dotted path, by default float32, in host
            memory.
        paths: of all parameters.
        weights: which of several sets they are ('ema', 'raw', ...).
        step: updates they have seen; 0 where the file does not say.
        autoencoder: folder of the VAE that came with it.
        class_names: by class index, where known.
        notes: what a user should know about how the file was understood.
        finiteness: what was seen of NaN and infinity in the parameters read so far.
        file_dtypes: path -> dtypes of the tensors that hold that parameter; None: float32.
        has_choice: whether the file names its weights; a bare state dict holds one set, unnamed.
    """

    kind: str
    path: Path
    config: ml_collections.ConfigDict
    read: Callable[..., np.ndarray]
    paths: tuple[str, ...]
    weights: str = "ema"
    step: int = 0
    autoencoder: Path | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    finiteness: Finiteness = dataclasses.field(default_factory=Finiteness)
    file_dtypes: Callable[[str], set[np.dtype]] | None = None
    has_choice: bool = True

    @property
    def chosen_weights(self) -> str:
        """', weights ema' for messages; '' where there is one set without a name."""
        return f", weights {self.weights}" if self.has_choice else ""

    @property
    def network(self) -> Network:
        """The network whose parameters these are."""
        return experiment.build_network(self.config)

    @functools.cached_property
    def param_dtype(self) -> str:
        """'bfloat16' if the file has all in it that a network may store so, else 'float32'."""
        narrow, of_file = np.dtype(jnp.bfloat16), self.file_dtypes
        if of_file is None or not any(narrow in of_file(path) for path in self.paths):
            return "float32"
        stored = self._dtypes("bfloat16")
        found = [of_file(path) == {narrow} for path in self.paths if stored[path] == narrow]
        return "bfloat16" if all(found) else "float32"

    def _dtypes(self, param_dtype: str) -> Mapping[str, np.dtype]:
        config = self.config.copy_and_resolve_references()
        config.model.param_dtype = param_dtype
        return parameter_dtypes(experiment.build_network(config))

    def load(
        self,
        put: Callable[[str, np.ndarray], Any] | None = None,
        *,
        param_dtype: str = "float32",
    ) -> dict[str, Any]:
        """All parameters, nested.

        Args:
            put: (path, array) -> leaf, called for each before the next is read, for instance to
                place it on (sharded) devices; by default on the first one.
            param_dtype: 'float32', or 'bfloat16' for inference: then arrays are read as what the
                network stores them in (`models.linear.Precision`), without a float32 copy.

        Raises:
            InteropError: NaN or infinity in them, unless the model was opened to allow that.
        """
        put = put or (lambda path, array: jnp.asarray(array))
        dtypes = {} if param_dtype == "float32" else self._dtypes(param_dtype)

        def read(path: str) -> np.ndarray:
            return self.read(path, dtypes[path]) if dtypes else self.read(path)

        params = unflatten((path, put(path, read(path))) for path in self.paths)
        self.finiteness.require(self.path)
        return params


def no_guidance(model: FoundModel) -> str:
    """Why a class-conditional model cannot be guided, "" if it can."""
    if not model.network.num_classes:
        return ""
    if not model.network.null_class:
        return "the model has no null class"
    if not model.config.method.label_dropout:
        return "the model's null class was never trained (label_dropout=0)"
    return ""
