"""Batches for training and evaluation, from images or from latents extracted beforehand."""

from dit_jax.data.labels import validate_labels
from dit_jax.data.latents import Latents, latents_header, open_latents
from dit_jax.data.pairs import Pairs, Teaching, open_pairs, pairs_header
from dit_jax.data.pipeline import BatchIterator, Loader, make_loader
from dit_jax.data.record_source import RecordSource
from dit_jax.data.records import Field, Header, RecordWriter, open_records
from dit_jax.data.registry import open_source, options_of, register_source
from dit_jax.data.source import (
    ArraySource,
    Batch,
    DatasetInfo,
    Example,
    Source,
    to_arrays,
)
from dit_jax.data.transforms import to_float

__all__ = [
    "ArraySource",
    "Batch",
    "BatchIterator",
    "DatasetInfo",
    "Example",
    "Field",
    "Header",
    "Latents",
    "Loader",
    "Pairs",
    "RecordSource",
    "RecordWriter",
    "Source",
    "Teaching",
    "latents_header",
    "make_loader",
    "open_latents",
    "open_pairs",
    "open_records",
    "open_source",
    "options_of",
    "pairs_header",
    "register_source",
    "to_arrays",
    "to_float",
    "validate_labels",
]
