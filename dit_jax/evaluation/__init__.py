"""Measuring samples: FID and its kin, similarity, label accuracy, memorisation, image files."""

from dit_jax.atomic import check_destination
from dit_jax.evaluation.digits.classifier import Classifier, train_classifier
from dit_jax.evaluation.digits.memorization import memorization_summary, nearest_neighbours
from dit_jax.evaluation.digits.network import CIFAR10, DIGITS, GREY_28, ClassifierSettings
from dit_jax.evaluation.digits.scores import evaluate_samples, label_accuracy
from dit_jax.evaluation.feature_scores import (
    InceptionScore,
    InceptionScoreAccumulator,
    KernelDistance,
    PrecisionRecall,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dit_jax.evaluation.feature_summary import FeatureSummary, InceptionLike, Progress, summarise
from dit_jax.evaluation.features import (
    FeatureExtractor,
    batches_of,
    extract_features,
    feature_statistics,
)
from dit_jax.evaluation.files import (
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
from dit_jax.evaluation.grid import (
    Panel,
    labelled_panel,
    render_panels,
    save_grid,
    save_panels,
    save_picture,
)
from dit_jax.evaluation.image_streams import (
    BatchImages,
    FolderImages,
    ImageSet,
    NpzImages,
    SourceImages,
)
from dit_jax.evaluation.images import ROUNDING_RULES, to_float, to_uint8
from dit_jax.evaluation.inception import InceptionExtractor, InceptionFeatures, InceptionNetwork
from dit_jax.evaluation.inception_evaluation import (
    SCORES,
    ScoreSettings,
    evaluate_images,
    format_scores,
)
from dit_jax.evaluation.published import (
    PROTOCOLS,
    Protocol,
    PublishedFigure,
    comparison_table,
    deviations,
    find_protocol,
)
from dit_jax.evaluation.record import build_record, code_version, content_hash
from dit_jax.evaluation.reference import (
    ReferenceStatistics,
    load_reference,
    open_reference,
    reference_from_images,
    reference_from_npz,
    save_reference,
)
from dit_jax.evaluation.sample_store import SampleStore
from dit_jax.evaluation.similarity import PerceptualDistance, load_lpips, mean_psnr, psnr, ssim

__all__ = [
    "CIFAR10",
    "DIGITS",
    "GREY_28",
    "PROTOCOLS",
    "ROUNDING_RULES",
    "SCORES",
    "BatchImages",
    "Classifier",
    "ClassifierSettings",
    "FeatureExtractor",
    "FeatureMismatchError",
    "FeatureSummary",
    "FolderImages",
    "GaussianStatistics",
    "ImageSet",
    "InceptionExtractor",
    "InceptionFeatures",
    "InceptionLike",
    "InceptionNetwork",
    "InceptionScore",
    "InceptionScoreAccumulator",
    "KernelDistance",
    "NpzImages",
    "Panel",
    "PerceptualDistance",
    "PrecisionRecall",
    "Progress",
    "Protocol",
    "PublishedFigure",
    "ReferenceStatistics",
    "SampleStore",
    "ScoreSettings",
    "SourceImages",
    "TooFewSamplesError",
    "batches_of",
    "build_record",
    "check_destination",
    "code_version",
    "comparison_table",
    "content_hash",
    "deviations",
    "evaluate_images",
    "evaluate_samples",
    "extract_features",
    "feature_statistics",
    "find_protocol",
    "format_scores",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "label_accuracy",
    "labelled_panel",
    "load_adm_npz",
    "load_lpips",
    "load_reference",
    "mean_psnr",
    "memorization_summary",
    "nearest_neighbours",
    "open_reference",
    "precision_recall",
    "psnr",
    "reference_from_images",
    "reference_from_npz",
    "render_panels",
    "save_adm_npz",
    "save_grid",
    "save_json",
    "save_panels",
    "save_picture",
    "save_png_folder",
    "save_reference",
    "ssim",
    "summarise",
    "to_float",
    "to_uint8",
    "train_classifier",
]
