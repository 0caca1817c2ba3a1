"""Losses in which a row brings its own candidates: NCE, logistic, triplet, pair, alignment; and the MI bound.

Each loss is one call of `contrast(paired=True)`: row i meets its own positive and the negatives it was
given, not the rest of the batch, and the value is the mean over rows. Everything is float32 (float64 stays
float64), also under autocast.

Shapes: N = rows, D = features, m = negatives of a row.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from clipkit.errors import InputError
from clipkit.losses import checks
from clipkit.losses.checks import Scalar
from clipkit.losses.primitive import contrast


def nce_loss(
    query: Tensor,
    positive: Tensor,
    noise: Tensor,
    *,
    temperature: Scalar,
    log_z: Scalar,
    num_noise_population: int,
) -> Tensor:
    """Noise-contrastive estimation with uniform noise: tell the positive from m noise samples, one by one.

        L = mean_i [ BCE(l_i0, 1) + Σ_{j=1…m} BCE(l_ij, 0) ],   l = cosine/τ − log Z − log(m / N_pop)

    Args:
        query: (N, D), floating.
        positive: (N, D).
        noise: (N, m, D) samples drawn uniformly from the population; one may be the positive itself.
        temperature: τ > 0.
        log_z: log Z of the model exp(cosine/τ) / Z over the population; number (fixed, or a running
            estimate) or tensor (learned).
        num_noise_population: N_pop ≥ 1, how many rows noise is drawn from.

    Returns:
        Scalar: summed over the 1 + m terms, mean over rows.

    Raises:
        InputError: shapes do not fit, m = 0, temperature ≤ 0 or N_pop < 1.

    References:
        Gutmann & Hyvärinen 2010, "Noise-contrastive estimation"; Wu et al. 2018, "Unsupervised Feature
        Learning via Non-Parametric Instance Discrimination", eq. 6-8, in logits instead of probabilities.
        Their code freezes Z at the first batch's estimate; here Z is the caller's.
    """
    checks.same_shape(query=checks.features("query", query), positive=checks.features("positive", positive))
    m = checks.features("noise", noise, "NmD").shape[1]
    if m == 0:
        raise InputError(f"noise {checks.describe(noise)} holds no samples")
    if isinstance(num_noise_population, bool) or not num_noise_population >= 1:
        raise InputError(f"num_noise_population must be >= 1, got {num_noise_population!r}")
    inverse = checks.temperature(temperature, query)
    return contrast(
        query,
        positive,
        paired=True,
        own_negatives=noise,
        scale=inverse,
        bias=-checks.scalar("log_z", log_z, inverse),
        log_noise=math.log(m / num_noise_population),
        link="nce",
    ).loss


def logistic_loss(u: Tensor, v: Tensor, negatives: Tensor, *, negative_weight: float = 1.0) -> Tensor:
    """Skip-gram with negative sampling on inner products; rows are not normalised.

        L = mean_i [ −log σ(⟨u_i, v_i⟩) − Q Σ_n log σ(−⟨u_i, n⟩) ]

    Args:
        u: (N, D), floating.
        v: (N, D); row i belongs to row i of `u`.
        negatives: (N, m, D) for each row, or (m, D) shared by all rows.
        negative_weight: Q ≥ 0.

    Returns:
        Scalar.

    Raises:
        InputError: shapes do not fit, or Q < 0.

    References:
        Mikolov et al. 2013, "Distributed Representations of Words and Phrases", eq. 4; Hamilton et al.
        2017, "Inductive Representation Learning on Large Graphs", eq. 1, whose code shares the negatives of
        a batch and sums over them; PyTorch Geometric's example takes the mean over all pairs instead.
    """
    checks.same_shape(u=checks.features("u", u), v=checks.features("v", v))
    if not isinstance(negatives, Tensor) or negatives.dim() not in (2, 3):
        raise InputError(f"negatives must be of shape (N, m, D) or (m, D), got {checks.describe(negatives)}")
    if not (math.isfinite(negative_weight) and negative_weight >= 0):
        raise InputError(f"negative_weight must be a finite number >= 0, got {negative_weight!r}")
    shared = negatives.dim() == 2
    return contrast(
        u,
        v,
        paired=True,
        negatives=negatives if shared else None,
        own_negatives=None if shared else negatives,
        log_weight=math.log(negative_weight) if negative_weight > 0 else -math.inf,
        link="logistic",
        similarity="inner_product",
    ).loss


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float,
    distance: Literal["euclidean", "cosine", "inner_product"] = "euclidean",
) -> Tensor:
    """The negative must be farther from the anchor than the positive by a margin.

        L = mean_i max(0, d(a_i, p_i) − d(a_i, n_i) + margin)

    Args:
        anchor: (N, D), floating; rows are not normalised ("cosine" does that itself).
        positive: (N, D).
        negative: (N, D).
        margin: ≥ 0.
        distance: "euclidean" (not squared), "cosine" (1 − cosine) or "inner_product" (minus it).

    Returns:
        Scalar.

    Raises:
        InputError: shapes differ, margin < 0, or an unknown distance.

    References:
        Weinberger & Saul 2009; Schroff et al. 2015, "FaceNet", eq. 2, with *squared* distances there.
        `torch.nn.functional.triplet_margin_loss` adds 1e-6 to every coordinate difference; this does not.
    """
    checks.same_shape(
        anchor=checks.features("anchor", anchor),
        positive=checks.features("positive", positive),
        negative=checks.features("negative", negative),
    )
    checks.one_of("distance", distance, ("euclidean", "cosine", "inner_product"))
    return contrast(
        anchor,
        positive,
        paired=True,
        own_negatives=negative[:, None],
        margin=margin,
        link="hinge",
        similarity=distance,
    ).loss


def pair_loss(x1: Tensor, x2: Tensor, same: Tensor, *, margin: float) -> Tensor:
    """Pull pairs that are the same together, push the others apart up to a margin; not normalised.

        L = mean_i [ y d² + (1 − y) max(0, margin − d)² ],   d = ‖x1_i − x2_i‖₂,  y = 1 if the same

    Args:
        x1: (N, D), floating.
        x2: (N, D).
        same: (N,) bool.
        margin: ≥ 0.

    Returns:
        Scalar.

    Raises:
        InputError: shapes do not fit, `same` is not bool, or margin < 0.

    References:
        Hadsell et al. 2006, "Dimensionality Reduction by Learning an Invariant Mapping", eq. 4, without its
        factor ½; pytorch-metric-learning's ContrastiveLoss does not square and averages only over the
        pairs with a loss.
    """
    checks.same_shape(x1=checks.features("x1", x1), x2=checks.features("x2", x2))
    if not isinstance(same, Tensor) or same.dtype != torch.bool or same.shape != x1.shape[:1]:
        raise InputError(f"same must be a bool tensor of shape ({x1.shape[0]},), got {checks.describe(same)}")
    return contrast(
        x1,
        x2,
        paired=True,
        positive=same[:, None],
        margin=margin,
        link="pair",
        similarity="euclidean",
    ).loss


def alignment_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Twice the cosine distance to a target that gets no gradient; no negatives.

        L = mean_i (2 − 2 cos(p_i, stop_gradient(t_i))) = mean_i ‖p̂_i − t̂_i‖²

    Args:
        prediction: (N, D), floating.
        target: (N, D); row i is the target of row i of `prediction`.

    Returns:
        Scalar in [0, 4]. BYOL adds the two swapped directions; SimSiam is half of this, minus 1.

    Raises:
        InputError: shapes differ.

    References:
        Grill et al. 2020, "Bootstrap Your Own Latent", eq. 2; Chen & He 2021, "Exploring Simple Siamese
        Representation Learning", eq. 1.
    """
    checks.same_shape(
        prediction=checks.features("prediction", prediction), target=checks.features("target", target)
    )
    return contrast(prediction, target.detach(), paired=True, link="align").loss


def mutual_information_bound(loss: Scalar, num_candidates: float | Tensor) -> Tensor:
    """InfoNCE's lower bound of the mutual information of query and positive, in nats.

        I ≥ log K − L

    Args:
        loss: L, mean of −log softmax of the positive among K candidates.
        num_candidates: K ≥ 1, the positive included.

    Returns:
        Scalar, at most log K: a value near it says that K is too small to measure more. A bound only if the
        positive is in the denominator, each row has one, and the negatives are drawn from the marginal
        (`contrast(...).mi_bound` is None where that is not so).

    Raises:
        InputError: K < 1, or an argument is not a number.

    References:
        van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 5.
    """
    like = loss.detach() if isinstance(loss, Tensor) else torch.zeros((), dtype=torch.float64)
    value = checks.scalar("loss", loss, like)
    count = num_candidates
    if isinstance(count, Tensor) and not count.is_floating_point():
        count = count.to(like.dtype)
    k = checks.scalar("num_candidates", count, like)
    if k.device.type == "cpu" and float(k.detach()) < 1:
        raise InputError(f"num_candidates must be >= 1, got {float(k.detach())}")
    return k.log() - value
