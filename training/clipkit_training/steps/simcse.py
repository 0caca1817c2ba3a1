"""SimCSE: sentences attract themselves under another dropout mask, or sentences that mean the same.

The one idea: two passes through a network with dropout are two views of a sentence. All passes, or the
sentences with their positives and hard negatives, are one flattened forward, so that masks differ from row to
row. The loss runs in one direction, from the sentence to its positive.

What is saved is the tower without the head that training puts on it, as in the paper without supervision.
The paper's supervised form keeps its head: for that take a tower that has one itself (of a transformers model
`pooling: pooler`, for BERT a linear layer and tanh on [CLS]) and `mlp: false`.

Shapes: N sentences of this rank, R = 2 N or 3 N rows, L tokens, D features, M candidates of all ranks.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.distributed import exchange, group_rank, unique_ids
from clipkit.errors import ConfigError, InputError
from clipkit.losses import contrast
from clipkit.models import Encoder, seeded
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Metrics, Setting, Step, collapse_figures
from clipkit_training.steps.pairs import caption_ids

_PROBE = ["a sentence and another one"] * 4


class SimCSEConfig(Config):
    """Options of SimCSE.

    Args:
        positive: "dropout": the sentence again (unsupervised); "caption": the first of `data.more_captions`;
            a second one is its hard negative (supervised).
        temperature: Of the cosines.
        mlp: Put a linear layer with tanh on the features in training.
        hard_negative_weight: α > 0: the own hard negative counts as α negatives. Of others' it is always 1.
        merge_equal: Sentences with the same tokens are no negatives of each other; in the paper they are.
    """

    positive: Literal["dropout", "caption"] = "dropout"
    temperature: Annotated[float, Field(gt=0)] = 0.05
    mlp: bool = True
    hard_negative_weight: Annotated[float, Field(gt=0)] = 1.0
    merge_equal: bool = True


class SimCSE(Step):
    """Sentences that attract their other pass, or their positive, and repel the rest of the batch.

        L = mean_i −log(exp(s_ii⁺) / Σ_j (exp(s_ij⁺) + α^[i=j] exp(s_ij⁻))),   s = cosine / τ

    Without supervision j⁺ is the second pass of sentence j, and there is no j⁻.

    References:
        Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", eq. 4 and 5; the weight
        of hard negatives in its appendix.
    """

    def __init__(self, model: Encoder, config: SimCSEConfig, setting: Setting) -> None:
        super().__init__()
        assert model.tokenizer is not None
        self.model, self.pad_id = model, model.tokenizer.pad_id
        self.config, self.group = config, setting.group
        self.head = nn.Sequential(nn.Linear(model.dim, model.dim), nn.Tanh()) if config.mlp else nn.Identity()

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch's sentences."""
        texts, n = self._texts(batch), len(batch.ids)
        if n < 2 and self.group is None:
            raise InputError("a batch of one sentence has no negatives", hint="raise data.batch_size")
        features_RD = self.model(torch.cat(texts))
        z_RD = self.head(features_RD)
        rule = self._pairs(texts) | {"scale": 1 / self.config.temperature, "group": self.group}
        output = contrast(z_RD[:n], z_RD[n:], **rule)
        assert output.accuracy is not None
        return output.loss, {
            "loss": output.value,
            "accuracy": output.accuracy,
            "positive_similarity": output.positive_similarity,
            "negative_similarity": output.negative_similarity,
            **collapse_figures(features_RD[:n]),
        }

    def _texts(self, batch: Batch) -> list[Tensor]:
        """Ids of sentences, positives and, if any, hard negatives, of one length. Raises: InputError."""
        more = batch.more_ids
        if len(more) not in ((0,) if self.config.positive == "dropout" else (1, 2)):
            raise InputError(
                f"step.positive: {self.config.positive} does not go with {len(more)} of data.more_captions",
                hint="dropout takes none; caption takes a positive, or that and a hard negative",
            )
        texts = [batch.ids, *(more or [batch.ids])]
        length = max(ids_NL.shape[1] for ids_NL in texts)
        return [F.pad(ids_NL, (0, length - ids_NL.shape[1]), value=self.pad_id) for ids_NL in texts]

    def _pairs(self, texts: list[Tensor]) -> dict[str, Any]:
        """Which candidates belong to which sentence, and how much a hard negative counts.

        A positive has the id of its sentence. A hard negative has an id of its own and, like the sentences,
        view 0: with the very tokens of a sentence it is left out there as the sentence itself.
        """
        n, device = len(texts[0]), texts[0].device
        if self.config.merge_equal:
            own_N, *_ = ids = [caption_ids(text, self.pad_id) for text in (texts[0], *texts[2:])]
        else:
            own_N = unique_ids(n, self.group, device)
            ids = [own_N, *(-1 - own_N for _ in texts[2:])]
        view_M = torch.tensor([1, 0][: len(ids)], device=device).repeat_interleave(n)
        pairs: dict[str, Any] = {"q_id": own_N, "k_id": torch.cat(ids), "k_view": view_M}
        weighs = len(ids) > 1 and self.config.hard_negative_weight != 1
        return pairs | ({"log_weight": self._log_weight(n, device)} if weighs else {})

    def _log_weight(self, n: int, device: torch.device) -> Tensor:
        """log α where a sentence meets its own hard negative, 0 elsewhere: (N, M over all ranks)."""
        rows = [[n]] if self.group is None else exchange([n], self.group, device)
        sizes = [2 * n for (n,) in rows]  # columns of each rank: its positives, then its hard negatives
        first = sum(sizes[: group_rank(self.group)]) + n
        log_NM = torch.zeros(n, sum(sizes), device=device)
        log_NM[:, first : first + n].fill_diagonal_(math.log(self.config.hard_negative_weight))
        return log_NM


def build_simcse(model: nn.Module, config: SimCSEConfig, setting: Setting) -> SimCSE:
    """SimCSE around a text encoder. Raises: ConfigError."""
    if not isinstance(model, Encoder) or model.tokenizer is None:
        raise ConfigError("step: simcse trains a text encoder", hint="set model.modality: text")
    if config.positive == "dropout" and not _differs_by_dropout(model):
        raise ConfigError(
            "step: simcse: the text tower has no dropout, so that both passes of a sentence would be equal",
            hint="set its dropout, for example model.tower.dropout 0.1, or step.positive: caption",
        )
    setting.need_negatives()
    return SimCSE(model, config, setting)


@torch.no_grad()
def _differs_by_dropout(model: Encoder) -> bool:
    """Whether equal sentences get unequal features in training: dropout may be anywhere in a tower."""
    assert model.tokenizer is not None
    was_training = model.training
    with seeded(0):
        features_4D = model.train()(model.tokenizer.encode(_PROBE).to(model.device))
    model.train(was_training)
    return not torch.equal(features_4D, features_4D[:1].expand_as(features_4D))
