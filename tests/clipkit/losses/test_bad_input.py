"""Wrong arguments are refused with an `InputError` that names the argument and what it got."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clipkit import losses
from clipkit.errors import InputError
from clipkit.losses import contrast

X, Y, Z = torch.randn(4, 3), torch.randn(4, 3), torch.randn(5, 3)
WIDE = torch.randn(4, 6)
IDS = torch.arange(4)

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: losses.clip_loss(X, Z, scale=1.0), r"image \(4, 3\) .* and text \(5, 3\)"),
    (lambda: losses.clip_loss(X, WIDE, scale=1.0), r"image \(4, 3\) .* and text \(4, 6\)"),
    (lambda: losses.clip_loss(X[0], Y, scale=1.0), r"image must be a floating .* got \(3,\)"),
    (lambda: losses.clip_loss(X.long(), Y, scale=1.0), r"image must be a floating tensor .*int64"),
    (lambda: losses.clip_loss(X[:0], Y[:0], scale=1.0), r"q \(0, 3\) .* no rows"),
    (lambda: losses.clip_loss(X[:, :0], Y[:, :0], scale=1.0), r"no features"),
    (lambda: losses.clip_loss(X, Y, scale=0.0), r"scale must be finite and > 0, got 0"),
    (lambda: losses.clip_loss(X, Y, scale=torch.tensor(-1.0)), r"scale must be .* got -1"),
    (lambda: losses.clip_loss(X, Y, scale=float("nan")), r"scale must be finite"),
    (lambda: losses.clip_loss(X, Y, scale=torch.ones(4)), r"scale must be a number .* \(4,\)"),
    (lambda: losses.siglip_loss(X, Y, scale=1.0, bias=float("inf")), r"bias must be finite"),
    (lambda: losses.siglip_loss(X, Y, scale=1.0, bias="0"), r"bias must be a number .* str"),  # type: ignore
    (lambda: losses.nt_xent_loss(X, Y, temperature=0.0), r"temperature must be finite and > 0, got 0"),
    (lambda: losses.nt_xent_loss(X, Z, temperature=0.1), r"z1 \(4, 3\) .* and z2 \(5, 3\)"),
    (lambda: losses.info_nce_loss(X, Y, temperature=-0.1), r"temperature must be .* got -0.1"),
    (lambda: losses.info_nce_loss(X, Z, temperature=0.1), r"query \(4, 3\) .* positive \(5, 3\)"),
    (
        lambda: losses.info_nce_loss(X, Y, negatives=WIDE, temperature=0.1),
        r"negatives \(4, 6\) .* q \(4, 3\)",
    ),
    (lambda: losses.info_nce_loss(X, Y, negatives=X[None], temperature=0.1), r"negatives must be .*\(K, D\)"),
    (lambda: losses.sup_con_loss(X, IDS.float(), temperature=0.1), r"labels must be a tensor of integers"),
    (lambda: losses.sup_con_loss(X, IDS[:3], temperature=0.1), r"labels must have shape \(4,\).* got \(3,\)"),
    (
        lambda: losses.nce_loss(X, Y, X, temperature=0.1, log_z=0.0, num_noise_population=9),
        r"noise must be .*\(N, m, D\)",
    ),
    (
        lambda: losses.nce_loss(X, Y, X[:, None][:, :0], temperature=0.1, log_z=0.0, num_noise_population=9),
        r"noise \(4, 0, 3\) .* no samples",
    ),
    (
        lambda: losses.nce_loss(X, Y, Z[:, None], temperature=0.1, log_z=0.0, num_noise_population=9),
        r"own_negatives \(5, 1, 3\) .* q \(4, 3\)",
    ),
    (
        lambda: losses.nce_loss(X, Y, X[:, None], temperature=0.1, log_z=0.0, num_noise_population=0),
        r"num_noise_population must be >= 1, got 0",
    ),
    (lambda: losses.logistic_loss(X, Y, X[0]), r"negatives must be .* got \(3,\)"),
    (lambda: losses.logistic_loss(X, Y, X, negative_weight=-1.0), r"negative_weight must be .* got -1.0"),
    (lambda: losses.triplet_loss(X, Y, Z, margin=1.0), r"negative \(5, 3\)"),
    (lambda: losses.triplet_loss(X, Y, X, margin=-1.0), r"margin must be .* got -1.0"),
    (lambda: losses.triplet_loss(X, Y, X, margin=1.0, distance="l1"), r"distance must be one of .*'l1'"),  # type: ignore
    (lambda: losses.pair_loss(X, Y, IDS, margin=1.0), r"same must be a bool tensor of shape \(4,\)"),
    (lambda: losses.pair_loss(X, Y, IDS[:2] > 0, margin=1.0), r"same must be .* got \(2,\)"),
    (lambda: losses.pair_loss(X, Y, IDS > 0, margin=-0.5), r"margin must be .* got -0.5"),
    (lambda: losses.alignment_loss(X, Z), r"prediction \(4, 3\) .* target \(5, 3\)"),
    (lambda: losses.mutual_information_bound(1.0, 0.5), r"num_candidates must be >= 1"),
    (lambda: contrast(X, WIDE), r"q \(4, 3\) .* and k \(4, 6\)"),
    (lambda: contrast(X, Z), r"q \(4, 3\) .* k \(5, 3\) .* give q_id and k_id"),
    (lambda: contrast(X, Z, paired=True), r"q \(4, 3\) .* k \(5, 3\)"),
    (lambda: contrast(X, Y, k_id=IDS), r"q_id is missing"),
    (lambda: contrast(X, Y, q_id=IDS.float()), r"q_id must be a tensor of integers"),
    (lambda: contrast(X, Z, q_id=IDS, k_id=IDS), r"k_id must have shape \(5,\)"),
    (lambda: contrast(X, Y, q_view=IDS[:2]), r"q_view must have shape \(4,\)"),
    (lambda: contrast(X, Y, k_view=0.5), r"k_view must be an integer"),  # type: ignore
    (lambda: contrast(X, Y, negative_id=IDS), r"negative_id is given without negatives"),
    (lambda: contrast(X, Y, negatives=Z, negative_id=IDS), r"negative_id must have shape \(5,\)"),
    (lambda: contrast(X, Y, own_negatives=Z[:, None]), r"own_negatives \(5, 1, 3\)"),
    (lambda: contrast(X, Y, ignore=IDS), r"ignore must be a bool tensor"),
    (lambda: contrast(X, Y, ignore=IDS[:3] > 0), r"ignore \(3,\) .* must broadcast to \(4, 4\)"),
    (lambda: contrast(X, Y, log_weight=torch.ones(2)), r"log_weight \(2,\) .* \(4, 4\)"),
    (lambda: contrast(X, Y, weight=torch.ones(3)), r"weight must be a tensor of shape \(4,\)"),
    (lambda: contrast(X, Y, link="cosine"), r"link must be one of .*'cosine'"),  # type: ignore
    (lambda: contrast(X, Y, direction="two"), r"direction must be one of"),  # type: ignore
    (lambda: contrast(X, Y, link="logistic", denominator="neg"), r"denominator and aggregate belong"),
    (lambda: contrast(X, Y, link="hinge"), r"margin belongs to"),
    (lambda: contrast(X, Y, margin=1.0), r"margin belongs to"),
    (lambda: contrast(X, Y, link="nce"), r"log_noise is needed"),
    (lambda: contrast(X, Y, link="hinge", margin=1.0, log_weight=1.0), r"log_weight belongs to"),
    (lambda: contrast(X, Y, link="pair", margin=1.0), r"link='pair' needs similarity='euclidean'"),
    (lambda: contrast(X, Y, link="align", similarity="euclidean"), r"link='align' needs"),
    (
        lambda: contrast(X, Y, direction="both", negatives=Z),
        r"direction='both' takes in-batch candidates only",
    ),
    (lambda: contrast(X, Y, block=0), r"block must be an integer >= 1"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_is_refused_by_name(case: int) -> None:
    call, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        call()
