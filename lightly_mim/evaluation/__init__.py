"""Evaluates an encoder on labelled images; takes any encoder, knows no method."""

from lightly_mim.evaluation.base import (
    FeatureProtocol,
    ImageProtocol,
    LabelledImages,
    Outcome,
    TrainingRun,
    rank_classes,
)
from lightly_mim.evaluation.cache import cached_features
from lightly_mim.evaluation.dense.evaluate import evaluate_dense
from lightly_mim.evaluation.dense.protocols import DenseKNN, DenseLinear
from lightly_mim.evaluation.dense.results import DenseResult, DenseResults
from lightly_mim.evaluation.embedding import embed
from lightly_mim.evaluation.evaluate import check_evaluation, evaluate
from lightly_mim.evaluation.feature_files import FeatureStore
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    Features,
    collect_features,
    extract_features,
)
from lightly_mim.evaluation.foreign_encoders import (
    AdaptedEncoder,
    AnyEncoder,
    RawPixels,
)
from lightly_mim.evaluation.label_free_measures import (
    alpha_req,
    label_free,
    rank_me,
    uniformity,
)
from lightly_mim.evaluation.loading import at_random, describe_encoder, load_encoder
from lightly_mim.evaluation.prediction import (
    Classifier,
    Predictions,
    load_classifier,
    predict,
)
from lightly_mim.evaluation.probes.attentive import (
    Attentive,
    AttentiveProbes,
    choose_attentive,
    fit_attentive_grid,
)
from lightly_mim.evaluation.probes.knn import KNN, choose_knn, knn_predict_grid
from lightly_mim.evaluation.probes.linear import (
    Linear,
    choose_linear,
    fit_linear_grid,
)
from lightly_mim.evaluation.probes.logistic import (
    Logistic,
    choose_logistic,
    fit_logistic_path,
)
from lightly_mim.evaluation.probes.low_label import LowLabel
from lightly_mim.evaluation.protocols import PROTOCOLS
from lightly_mim.evaluation.results import PIXELS, RANDOM, Result, Results
from lightly_mim.evaluation.scores import wilson_interval
from lightly_mim.evaluation.show import show
from lightly_mim.evaluation.splits import draw_per_class
from lightly_mim.evaluation.supervised.finetune import FineTune, FineTuned
from lightly_mim.evaluation.supervised.linear_mae import LinearMAE

__all__ = [
    "KNN",
    "PIXELS",
    "PROTOCOLS",
    "RANDOM",
    "AdaptedEncoder",
    "AnyEncoder",
    "Attentive",
    "AttentiveProbes",
    "Classifier",
    "DenseKNN",
    "DenseLinear",
    "DenseResult",
    "DenseResults",
    "EncoderFeatures",
    "FeatureProtocol",
    "FeatureStore",
    "Features",
    "FineTune",
    "FineTuned",
    "ImageProtocol",
    "LabelledImages",
    "Linear",
    "LinearMAE",
    "Logistic",
    "LowLabel",
    "Outcome",
    "Predictions",
    "RawPixels",
    "Result",
    "Results",
    "TrainingRun",
    "alpha_req",
    "at_random",
    "cached_features",
    "check_evaluation",
    "choose_attentive",
    "choose_knn",
    "choose_linear",
    "choose_logistic",
    "collect_features",
    "describe_encoder",
    "draw_per_class",
    "embed",
    "evaluate",
    "evaluate_dense",
    "extract_features",
    "fit_attentive_grid",
    "fit_linear_grid",
    "fit_logistic_path",
    "knn_predict_grid",
    "label_free",
    "load_classifier",
    "load_encoder",
    "predict",
    "rank_classes",
    "rank_me",
    "show",
    "uniformity",
    "wilson_interval",
]
