"""Measuring samples: features, Fréchet distance, label accuracy, memorisation, and image files."""

from dit_jax.evaluation.classifier import CIFAR10, DIGITS, GREY_28, Classifier, ClassifierSettings
from dit_jax.evaluation.classifier_training import train_classifier
from dit_jax.evaluation.features import (
    FeatureExtractor,
    batches_of,
    extract_features,
    feature_statistics,
)
from dit_jax.evaluation.files import (
    check_destination,
    load_adm_npz,
    save_adm_npz,
    save_json,
    save_png_folder,
)
from dit_jax.evaluation.frechet import (
    FeatureMismatchError,
    GaussianStatistics,
    TooFewSamplesError,
    frechet_distance,
)
from dit_jax.evaluation.grid import Panel, save_grid, save_panels
from dit_jax.evaluation.images import ROUNDING_RULES, to_float, to_uint8
from dit_jax.evaluation.memorization import (
    MemorizationSummary,
    NearestNeighbours,
    memorization_summary,
    nearest_neighbours,
)
from dit_jax.evaluation.metrics import evaluate_samples, label_accuracy, psnr
from dit_jax.evaluation.record import build_record, code_version, content_hash

__all__ = [
    "CIFAR10",
    "DIGITS",
    "GREY_28",
    "ROUNDING_RULES",
    "Classifier",
    "ClassifierSettings",
    "FeatureExtractor",
    "FeatureMismatchError",
    "GaussianStatistics",
    "MemorizationSummary",
    "NearestNeighbours",
    "Panel",
    "TooFewSamplesError",
    "batches_of",
    "build_record",
    "check_destination",
    "code_version",
    "content_hash",
    "evaluate_samples",
    "extract_features",
    "feature_statistics",
    "frechet_distance",
    "label_accuracy",
    "load_adm_npz",
    "memorization_summary",
    "nearest_neighbours",
    "psnr",
    "save_adm_npz",
    "save_grid",
    "save_json",
    "save_panels",
    "save_png_folder",
    "to_float",
    "to_uint8",
    "train_classifier",
]
