"""Instance discrimination by noise-contrastive estimation: tell a picture's row from m rows drawn at random.

The one idea: the softmax over a large bank is replaced by yes-or-no questions, for which its normaliser Z
must be known. Z can be estimated once, followed, or learned as one more parameter; whichever it is, it and
the question whether it was set already are in the state dict.

    l_ij = cosine(f_i, v_j) / τ − log Z − log(m / N)      L_i = BCE(l_ii, 1) + Σ_{j = 1…m} BCE(l_ij, 0)

N is the number of samples from the first step on. Z grows with N, so in l_ij only log m remains of the two:
that the bank is not full in the first epoch changes nothing.

Shapes: n rows of this rank, D dimensions of an embedding, m draws of a step, M rows of the bank.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipkit.distributed import max_over_group, sum_over_group
from clipkit.losses import contrast
from clipkit.losses.similarity import cosine
from clipkit.models import Encoder
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Metrics, Setting, collapse_figures
from clipkit_training.steps.images import image_encoder
from clipkit_training.steps.instdisc import BankConfig, BankStep

_KEPT = 0.99  # of a moving Z in each step


class NceConfig(BankConfig):
    """Options of `nce`.

    Args:
        draws: m, how many rows of the bank are noise in a step.
        z: "learnable": log Z is a parameter. "moving": the mean of log Z over the last hundred steps or so.
            "fixed": the first step's estimate for good, as in the paper's code, kept for comparison: the
            embeddings of an untrained network are alike, which makes it up to e^{1/τ} times too large.
        z_rate: Learning rate of log Z relative to that of the weights. Adam moves a parameter by about its
            rate, and log Z has 1/τ to go as embeddings spread.
    """

    draws: int = Field(default=4096, ge=1)
    z: Literal["learnable", "moving", "fixed"] = "learnable"
    z_rate: float = Field(default=1.0, gt=0)


class NceStep(BankStep):
    """NCE of each picture's own row of the bank against noise, with Z as the options say.

    The draws of a step are shared by its rows, which makes their scores one matrix product. As in the paper,
    a draw may be of the row's own sample.

    References:
        Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", eq. 4-8;
        Gutmann & Hyvärinen 2010, "Noise-contrastive estimation", for Z as a parameter.
    """

    log_z: Tensor
    started: Tensor

    def __init__(self, model: Encoder, config: NceConfig, setting: Setting) -> None:
        super().__init__(model, config, setting)
        self.draws, self.z, self.log_n = config.draws, config.z, math.log(setting.samples)
        log_z = torch.tensor(self.log_n, dtype=torch.float32)
        if config.z == "learnable":
            self.log_z = nn.Parameter(log_z)
            self.lr_scales = {"log_z": config.z_rate}
        else:
            self.register_buffer("log_z", log_z)
        self.register_buffer("started", torch.tensor(False))

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch; its rows of the bank move, and so may Z."""
        f_nD, index_n = self.embed(batch)
        noise_mD, noise_id_m = self.drawn(self.draws, batch.step)
        self._follow_z(f_nD, index_n, noise_mD, noise_id_m)
        out = contrast(
            f_nD, self.bank.lookup(index_n), q_id=index_n, paired=True, negatives=noise_mD,
            scale=self.scale, bias=-self.log_z, log_noise=math.log(self.draws) - self.log_n,
            link="nce", group=self.group,
        )  # fmt: skip
        self.bank.update(index_n, f_nD, group=self.group)
        return out.loss, {
            "loss": out.value,
            "positive_similarity": out.positive_similarity,
            "negative_similarity": out.negative_similarity,
            "log_z": self.log_z.detach().clone(),
            **collapse_figures(f_nD),
        }

    @torch.no_grad()
    def _follow_z(self, f_nD: Tensor, index_n: Tensor, noise_mD: Tensor, noise_id_m: Tensor) -> None:
        """Set Z in the first step that can tell, and move it in later ones where it is to move."""
        if not bool(self.started):
            log_z = self._estimate(f_nD, index_n, *self.bank.valid())
        elif self.z == "moving":
            log_z = self.log_z.lerp(self._estimate(f_nD, index_n, noise_mD, noise_id_m), 1 - _KEPT)
        else:
            return
        if bool(log_z.isfinite()):
            self.log_z.copy_(log_z)
            self.started.fill_(True)

    def _estimate(self, f_nD: Tensor, index_n: Tensor, rows_MD: Tensor, ids_M: Tensor) -> Tensor:
        """log Z = log(N · mean exp(cosine / τ)) over the other samples' rows, for the rows of all ranks.

        A row's own sample is left out: its e^{1/τ} would be most of the mean where few were seen.

        Returns:
            0-d; nan where there are no others.
        """
        own_nM = index_n[:, None] == ids_M
        score_nM = (cosine(f_nD, rows_MD) * self.scale).masked_fill(own_nM, -math.inf)
        mine = score_nM.flatten().logsumexp(0)
        largest = max_over_group(mine, self.group)
        total, others = sum_over_group(torch.stack([(mine - largest).exp(), (~own_nM).sum()]), self.group)
        return self.log_n + largest + (total / others).log()


def build_nce(model: nn.Module, config: NceConfig, setting: Setting) -> NceStep:
    """Instance discrimination by NCE."""
    return NceStep(image_encoder(model, "nce"), config, setting)
