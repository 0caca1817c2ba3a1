"""Figures of merit as pure functions of tensors: retrieval, nearest neighbours, the spectrum of features."""

from clipkit.metrics.knn import knn_accuracy, knn_neighbours, knn_predict
from clipkit.metrics.retrieval import retrieval_ranks, retrieval_recall, zero_shot_accuracy
from clipkit.metrics.spectrum import embedding_std, rank_me

__all__ = [
    "embedding_std",
    "knn_accuracy",
    "knn_neighbours",
    "knn_predict",
    "rank_me",
    "retrieval_ranks",
    "retrieval_recall",
    "zero_shot_accuracy",
]
