"""Instance discrimination: every picture is a class of its own, whose weight is the picture's row in a bank.

The one idea: the bank remembers what each picture of the data set was encoded as, so that one view of it is
compared with all others without encoding them. A picture that comes up for the first time gets its embedding
as its row before the loss, so the loss is defined from the first step on and nothing random stands in for
what was not seen: in the first epoch pictures only learn to differ from those before them.

Shapes: n rows of this rank, D dimensions of an embedding, S picture side, M rows of the bank that compete.
"""

from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.errors import ConfigError, InputError
from clipkit.losses import contrast
from clipkit.models import Encoder
from clipkit.models.batch_norm import synchronised
from clipkit.models.heads import mlp_head
from clipkit.state import Bank
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Metrics, Setting, Step, collapse_figures
from clipkit_training.steps.images import image_encoder


class BankConfig(Config):
    """Options of steps with a bank.

    Args:
        temperature: τ of the logits cosine / τ; 0.1 suits pictures of up to 96 pixels.
        dim: D.
        momentum: Weight of a picture's old row when it comes up again.
        sync_batch_norm: BatchNorm takes the statistics of all processes.
    """

    temperature: float = Field(default=0.07, ge=0.005)
    dim: int = Field(default=128, ge=1)
    momentum: float = Field(default=0.5, ge=0, lt=1)
    sync_batch_norm: bool = True


class InstDiscConfig(BankConfig):
    """Options of `instdisc`.

    Args:
        draws: How many rows of the bank compete in a step, drawn anew for each; None for all of them.
    """

    draws: int | None = Field(default=None, ge=1)


class BankStep(Step):
    """A backbone, a linear head and a bank with a row for each training sample.

    Args:
        model: The backbone; its BatchNorm layers are changed in place.
        config: The options.
        setting: The run.

    Raises:
        ConfigError: The number of training samples is not known, or is 1.
    """

    def __init__(self, model: Encoder, config: BankConfig, setting: Setting) -> None:
        super().__init__()
        if setting.samples == 0:
            raise ConfigError(
                "step: a bank has one row for each training sample, but a stream does not tell how many",
                hint="give the shards without stream:, or use step: moco_v2, whose queue needs no number",
            )
        setting.need_negatives()
        self.group, self.generator = setting.group, setting.generator
        self.scale = 1 / config.temperature
        self.model = synchronised(model, setting.group) if config.sync_batch_norm else model
        self.head = mlp_head([model.dim, config.dim], batch_norm=False, last_bias=True)
        self.bank = Bank(setting.samples, config.dim, momentum=config.momentum)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings (n, D) of a batch and the indices (n,) of its samples, each of which is in the bank."""
        f_nD = self.head(self.model.encode(first_view(batch)))
        index_n = batch.index.to(f_nD.device)
        if not bool(self.bank.seen.all()):  # the same on every rank, as the banks are
            new_n = ~self.bank.seen[index_n]
            self.bank.update(index_n[new_n], f_nD[new_n], group=self.group)
        return f_nD, index_n

    def drawn(self, count: int, step: int) -> tuple[Tensor, Tensor]:
        """Rows (count, D) of the bank and their ids, the same on every rank and for any number of ranks."""
        return self.bank.sample(count, generator=self.generator(step))


class InstDiscStep(BankStep):
    """Softmax of each picture's own row among the rows of the bank.

        L_i = −log(exp(⟨v_i, f_i⟩ / τ) / Σ_j exp(⟨v_j, f_i⟩ / τ)),   j over the bank, or i and the draws

    Draws are shared by the rows of a step; one of the row's own sample is left out.

    References:
        Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", eq. 2;
        with draws, the softmax form of Tian et al. 2020, "Contrastive Multiview Coding".
    """

    def __init__(self, model: Encoder, config: InstDiscConfig, setting: Setting) -> None:
        super().__init__(model, config, setting)
        self.draws = config.draws

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch; its rows of the bank move."""
        f_nD, index_n = self.embed(batch)
        rows_MD, ids_M = self.bank.valid() if self.draws is None else self.drawn(self.draws, batch.step)
        out = contrast(
            f_nD, self.bank.lookup(index_n), q_id=index_n, paired=True,
            negatives=rows_MD, negative_id=ids_M, scale=self.scale, group=self.group,
        )  # fmt: skip
        self.bank.update(index_n, f_nD, group=self.group)
        assert out.accuracy is not None
        return out.loss, {
            "loss": out.value,
            "accuracy": out.accuracy,
            "positive_similarity": out.positive_similarity,
            "negative_similarity": out.negative_similarity,
            **collapse_figures(f_nD),
        }


def first_view(batch: Batch) -> Tensor:
    """The first view of a batch, or its pictures where no views were asked for, uint8 (n, 3, S, S).

    Of a family of two views the second is made for nothing; `data.views: {views: [...]}` can ask for one.

    Raises:
        InputError: There are less than two pictures.
    """
    if len(batch.sample_ids) < 2:
        raise InputError(
            f"this step needs at least two pictures in each process, this batch has {len(batch.sample_ids)}",
            hint="raise data.batch_size",
        )
    return batch.views[0] if batch.views else batch.images


def build_instdisc(model: nn.Module, config: InstDiscConfig, setting: Setting) -> InstDiscStep:
    """Instance discrimination with a softmax."""
    return InstDiscStep(image_encoder(model, "instdisc"), config, setting)
