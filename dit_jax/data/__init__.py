"""Batches for training and evaluation, from images or from latents extracted beforehand."""

from dit_jax.data.latents import Latents, LatentsHeader, open_latents
from dit_jax.data.latents_writer import LatentsWriter
from dit_jax.data.pairs import Pairs, PairsHeader, open_pairs
from dit_jax.data.pairs_writer import PairsWriter
from dit_jax.data.pipeline import BatchIterator, Loader, make_loader
from dit_jax.data.registry import open_source, options_of, register_source
from dit_jax.data.source import (
    ArraySource,
    Batch,
    DatasetInfo,
    Example,
    Source,
    to_arrays,
    validate_labels,
)
from dit_jax.data.transforms import to_float

__all__ = [
    "ArraySource",
    "Batch",
    "BatchIterator",
    "DatasetInfo",
    "Example",
    "Latents",
    "LatentsHeader",
    "LatentsWriter",
    "Loader",
    "Pairs",
    "PairsHeader",
    "PairsWriter",
    "Source",
    "make_loader",
    "open_latents",
    "open_pairs",
    "open_source",
    "options_of",
    "register_source",
    "to_arrays",
    "to_float",
    "validate_labels",
]
