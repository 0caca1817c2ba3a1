"""Losses whose negatives are the other rows of the batch: CLIP, SigLIP, NT-Xent, InfoNCE, SupCon.

Each is one call of `contrast`. All normalise rows inside and compute in float32 (float64 stays float64),
also under autocast. With `group` the rows of all its ranks are candidates; each rank then returns W × its
share of the global loss, so that after DDP's mean every gradient (features, scale, bias) is the one that a
single process with the whole batch has. The mean of the returned values over the ranks is the loss itself.

Shapes: N = rows (of this rank, where a group is given), D = features, K = shared negatives, W = ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed import unique_ids
from clipkit.losses import checks
from clipkit.losses.checks import Scalar
from clipkit.losses.engine import Exchange
from clipkit.losses.primitive import contrast


def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    scale: Scalar,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "gather",
) -> Tensor:
    """Symmetric cross-entropy of matching images with texts.

        L = ½ (mean_i −log softmax_j(s ⟨x_i, y_j⟩)_i + mean_j −log softmax_i(s ⟨x_i, y_j⟩)_j)

    Args:
        image: (N, D), floating.
        text: (N, D); row i belongs to row i of `image`.
        scale: s = 1/τ > 0, the exponential of CLIP's `logit_scale`; number or tensor with its gradient.
        group: gather both sides over these ranks.
        exchange: how, see `contrast`.

    Returns:
        Scalar. Collapsed embeddings give log N.

    Raises:
        InputError: shapes differ, or scale ≤ 0.

    References:
        Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", fig. 3.
        open_clip's `ClipLoss` is the same; its default (`local_loss` and `gather_with_grad` off) trains
        with feature gradients 1/W of these, and with `local_loss` alone the column terms are missing.
    """
    checks.same_shape(image=checks.features("image", image), text=checks.features("text", text))
    return contrast(image, text, scale=scale, direction="both", group=group, exchange=exchange).loss


def siglip_loss(
    image: Tensor,
    text: Tensor,
    *,
    scale: Scalar,
    bias: Scalar,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "gather",
) -> Tensor:
    """Binary cross-entropy over all image–text pairs, summed and divided by N.

        L = 1/N Σ_i Σ_j log(1 + exp(−y_ij (s ⟨x_i, y_j⟩ + b))),   y_ij = 1 if i = j else −1

    Args:
        image: (N, D), floating.
        text: (N, D); row i belongs to row i of `image`.
        scale: s > 0, number or tensor with its gradient; SigLIP starts at 10.
        bias: b, number or tensor with its gradient; SigLIP starts at −10.
        group: gather the texts over these ranks.
        exchange: how, see `contrast`.

    Returns:
        Scalar.

    Raises:
        InputError: shapes differ, or scale ≤ 0.

    References:
        Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", eq. 3 and algorithm 1 (divided by
        N, not by the N² pairs). open_clip's `SigLipLoss` on one process is the same.
    """
    checks.same_shape(image=checks.features("image", image), text=checks.features("text", text))
    return contrast(image, text, scale=scale, bias=bias, link="logistic", group=group, exchange=exchange).loss


def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Scalar,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "gather",
) -> Tensor:
    """SimCLR's normalised temperature-scaled cross-entropy over 2N rows.

        L = 1/(2N) Σ_i −log(exp(s_ip) / Σ_{j≠i} exp(s_ij)),   s_ij = ⟨z_i, z_j⟩ / τ,  z = [z1; z2]

    p is the other view of i; the denominator has 2N − 1 terms: the positive is in it, the row itself not.

    Args:
        z1: (N, D), floating.
        z2: (N, D); row i is another view of row i of `z1`.
        temperature: τ > 0.
        group: gather both views over these ranks.
        exchange: how, see `contrast`.

    Returns:
        Scalar. Collapsed embeddings give log(2N − 1).

    Raises:
        InputError: shapes differ, or temperature ≤ 0.

    References:
        Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", eq. 1 and
        algorithm 1 (the mean over 2N). The authors' code returns the sum of the two views' means, twice
        this; lightly's and pytorch-metric-learning's NTXentLoss are the same as this.
    """
    checks.same_shape(z1=checks.features("z1", z1), z2=checks.features("z2", z2))
    n, device = z1.shape[0], z1.device
    z_2ND = torch.cat([z1, z2])
    ids = unique_ids(n, group, device).repeat(2)
    views = torch.arange(2, device=device).repeat_interleave(n)
    inverse = checks.temperature(temperature, z_2ND)
    return contrast(
        z_2ND,
        z_2ND,
        q_id=ids,
        k_id=ids,
        q_view=views,
        k_view=views,
        scale=inverse,
        group=group,
        exchange=exchange,
    ).loss


def info_nce_loss(
    query: Tensor,
    positive: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: Scalar,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "gather",
) -> Tensor:
    """Cross-entropy of picking a query's own positive among candidates; one direction.

        L = mean_i −log(exp(s_ip) / (exp(s_ip) + Σ_n exp(s_in))),   s = cosine / τ

    Without `negatives`, n runs over the other rows of `positive` (CPC, SimCSE, the N-pair loss); with
    them, over the K rows of `negatives` alone (MoCo).

    Args:
        query: (N, D), floating.
        positive: (N, D); row i belongs to row i of `query`.
        negatives: (K, D) or None. Keys that must get no gradient are passed detached; `group` leaves them
            as they are (a queue holds every rank's keys already).
        temperature: τ > 0.
        group: gather the positives over these ranks, where they are candidates.
        exchange: how, see `contrast`.

    Returns:
        Scalar. Collapsed embeddings give log N, or log(1 + K).

    Raises:
        InputError: shapes do not fit, or temperature ≤ 0.

    References:
        van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4;
        He et al. 2020, "Momentum Contrast", eq. 1. The positive is in the denominator; GraphCL's code,
        CEBRA and decoupled contrastive learning leave it out (`contrast(denominator="neg")`), and then
        log K − L bounds nothing. MoCo v3 multiplies by 2τ and sums both directions.
    """
    checks.same_shape(query=checks.features("query", query), positive=checks.features("positive", positive))
    inverse = checks.temperature(temperature, query)
    paired = negatives is not None
    return contrast(
        query, positive, paired=paired, negatives=negatives, scale=inverse, group=group, exchange=exchange
    ).loss


def sup_con_loss(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: Scalar,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "gather",
) -> Tensor:
    """Supervised contrastive loss, with the mean over positives outside the logarithm ("out").

        L = mean_i −1/|P_i| Σ_{p∈P_i} log(exp(s_ip) / Σ_{j≠i} exp(s_ij)),   s_ij = ⟨z_i, z_j⟩ / τ

    P_i are the other rows with the label of i. Rows without any are left out of the mean; when that is all
    of them the loss is 0.

    Args:
        z: (N, D), floating; several views of a sample are several rows with one label.
        labels: (N,) integers.
        temperature: τ > 0.
        group: gather rows and labels over these ranks.
        exchange: how, see `contrast`.

    Returns:
        Scalar. Collapsed embeddings give log(N − 1).

    Raises:
        InputError: shapes do not fit, labels are not integers, or temperature ≤ 0.

    References:
        Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2. The authors' code multiplies by
        τ / base temperature (1 when both are 0.07) and gives nan for a row without positives;
        pytorch-metric-learning's SupConLoss is the same as this. For eq. 3 use `contrast(aggregate="in")`.
    """
    checks.features("z", z)
    n, device = z.shape[0], z.device
    labels = checks.integers("labels", labels, (n,), device)
    rows = unique_ids(n, group, device)  # as view: a row is itself only where the row number is equal too
    inverse = checks.temperature(temperature, z)
    return contrast(
        z,
        z,
        q_id=labels,
        k_id=labels,
        q_view=rows,
        k_view=rows,
        scale=inverse,
        group=group,
        exchange=exchange,
    ).loss
