"""Contrastive losses as pure functions of tensors, all of them thin calls of one primitive, `contrast`."""

from clipkit.losses import similarity
from clipkit.losses.cached import cached_backward
from clipkit.losses.geometry import alignment, uniformity
from clipkit.losses.in_batch import clip_loss, info_nce_loss, nt_xent_loss, siglip_loss, sup_con_loss
from clipkit.losses.output import ContrastOutput
from clipkit.losses.primitive import contrast
from clipkit.losses.row_wise import (
    alignment_loss,
    logistic_loss,
    mutual_information_bound,
    nce_loss,
    pair_loss,
    triplet_loss,
)

__all__ = [
    "ContrastOutput",
    "alignment",
    "alignment_loss",
    "cached_backward",
    "clip_loss",
    "contrast",
    "info_nce_loss",
    "logistic_loss",
    "mutual_information_bound",
    "nce_loss",
    "nt_xent_loss",
    "pair_loss",
    "siglip_loss",
    "similarity",
    "sup_con_loss",
    "triplet_loss",
    "uniformity",
]
