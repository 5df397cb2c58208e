"""Evaluates an encoder on labelled images; takes any encoder, knows no method."""

from lightly_mim.evaluation.features import (
    EncoderFeatures,
    Features,
    PixelFeatures,
    collect_features,
    extract_features,
)
from lightly_mim.evaluation.knn import KNN, choose_knn, knn_predict_grid
from lightly_mim.evaluation.linear import (
    Linear,
    choose_linear,
    fit_and_score_linear,
    fit_linear_grid,
)
from lightly_mim.evaluation.loading import at_random, load_encoder
from lightly_mim.evaluation.suite import Result, Results, evaluate, wilson_interval

__all__ = [
    "KNN",
    "EncoderFeatures",
    "Features",
    "Linear",
    "PixelFeatures",
    "Result",
    "Results",
    "at_random",
    "choose_knn",
    "choose_linear",
    "collect_features",
    "evaluate",
    "extract_features",
    "fit_and_score_linear",
    "fit_linear_grid",
    "knn_predict_grid",
    "load_encoder",
    "wilson_interval",
]
