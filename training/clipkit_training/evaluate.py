"""Judging an image-text model: retrieval both ways against a gallery, loss, and zero-shot accuracy.

A query's right answers are all gallery items with the same caption, so duplicates never count as errors.
Figures on pairs that were trained on ("seen") and on pairs that were not ("heldout") are kept apart under
these names everywhere.

Shapes: N queries, M gallery items, D dimension.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipkit.errors import DataError
from clipkit.files import model_folder, read_manifest
from clipkit.losses import clip_loss, siglip_loss
from clipkit.metrics import retrieval_recall
from clipkit.models import DualEncoder, build_model, load_model
from clipkit.zero_shot import MAX_LABELS, ZeroShotClassifier
from clipkit_data.batches.pairs import Dataset, EvalBatches, Pairs
from clipkit_data.batches.reads import content_of
from clipkit_data.dataset import ShardDataset
from clipkit_data.lines import LineDataset
from clipkit_data.records import Record, group_faults
from clipkit_data.sources import resolve_shards

KS = (1, 5, 10)


@dataclass(frozen=True)
class Encoded:
    """Encoded image-text pairs: `image_ND` and `text_ND` are L2-normalised float32 on the CPU.

    `faults` has a reason for each sample that was left out.
    """

    image_ND: Tensor
    text_ND: Tensor
    records: list[Record]
    faults: list[str]

    @classmethod
    def join(cls, parts: Sequence["Encoded"]) -> "Encoded":
        """The pairs of several sets, one after the other."""
        return cls(
            torch.cat([part.image_ND for part in parts]),
            torch.cat([part.text_ND for part in parts]),
            [record for part in parts for record in part.records],
            [reason for part in parts for reason in part.faults],
        )

    @property
    def captions(self) -> list[str]:
        """The caption of each pair."""
        return [record.caption or "" for record in self.records]


@torch.inference_mode()
def encode_pairs(
    model: DualEncoder, batches: Iterable[Pairs], advance: Callable[[int], None] = lambda count: None
) -> Encoded:
    """Encode image-text pairs in their order.

    Args:
        model: Its towers run in eval mode, and return to the mode they were in.
        batches: Decoded pairs, for example `EvalBatches(dataset, content_of(model))`.
        advance: Called with the number of pairs done after each batch.
    """
    was_training = model.training
    model.eval()
    images, texts, records, faults, first = [], [], [], [], ""
    for batch in batches:
        if batch.records:
            images.append(model.encode_image(batch.images.to(model.device)).cpu())
            texts.append(model.encode_text(model.tokenize(batch.captions).to(model.device)).cpu())
            records += batch.records
        advance(len(batch.records) + len(batch.faults))
        for fault in batch.faults:
            faults.append(fault.reason)
            first = first or fault.detail
    model.train(was_training)
    if not records:
        raise DataError(f"there is no pair to evaluate on{f'; the first: {first}' if first else ''}")
    return Encoded(torch.cat(images), torch.cat(texts), records, faults)


def retrieval(queries: Encoded, gallery: Encoded) -> dict[str, Any]:
    """Recall@{1, 5, 10} of `queries` among `gallery`, both ways. The gallery must hold the queries."""
    group_of = {caption: number for number, caption in enumerate(dict.fromkeys(gallery.captions))}
    query_N = torch.tensor([group_of[caption] for caption in queries.captions])
    gallery_M = torch.tensor([group_of[caption] for caption in gallery.captions])
    return {
        "text_to_image": _recall(queries.text_ND, gallery.image_ND, query_N, gallery_M),
        "image_to_text": _recall(queries.image_ND, gallery.text_ND, query_N, gallery_M),
        "queries": len(queries.records),
        "gallery": len(gallery.records),
    }


def _recall(query_ND: Tensor, gallery_MD: Tensor, query_N: Tensor, gallery_M: Tensor) -> dict[str, float]:
    recall = retrieval_recall(query_ND, gallery_MD, query_N, gallery_M, ks=KS)
    return {f"recall@{k}": round(float(recall[f"recall@{k}"]), 4) for k in KS}


def pair_loss(model: DualEncoder, pairs: Encoded, batch_size: int = 256) -> float:
    """The model's own loss on pairs, mean over batches of `batch_size`."""
    scale = model.scale.detach().cpu()
    losses = []
    for image_ND, text_ND in zip(
        pairs.image_ND.split(batch_size), pairs.text_ND.split(batch_size), strict=True
    ):
        if model.bias is None:
            losses.append(clip_loss(image_ND, text_ND, scale=scale) * len(image_ND))
        else:
            bias = model.bias.detach().float().cpu()
            losses.append(siglip_loss(image_ND, text_ND, scale=scale, bias=bias) * len(image_ND))
    return float(torch.stack(losses).sum() / len(pairs.records))


def zero_shot_accuracy(model: DualEncoder, pairs: Encoded, field: str) -> float | None:
    """Share of pictures whose best label among all values of a metadata field is their own.

    Returns None when fewer than two values occur, or more than a classifier takes.
    """
    values = {index: record.meta.get(field) for index, record in enumerate(pairs.records)}
    known = {index: value for index, value in values.items() if isinstance(value, str) and value.strip()}
    labels = list(dict.fromkeys(known.values()))
    if not 2 <= len(labels) <= MAX_LABELS:
        return None
    classifier = ZeroShotClassifier(model, labels, templates=("{}",))
    scores_NM = classifier.score(pairs.image_ND[list(known)].numpy())
    place = {label: number for number, label in enumerate(labels)}
    truth_N = np.array([place[value] for value in known.values()])
    return round(float((np.argmax(scores_NM, axis=1) == truth_N).mean()), 4)


def report(
    model: DualEncoder,
    query_sets: dict[str, list[ShardDataset]],
    gallery: Sequence[ShardDataset] = (),
    *,
    zero_shot_field: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Retrieval figures of each query set against all query sets and `gallery` together.

    Args:
        model: The model to judge.
        query_sets: Data by name, `heldout` and `seen`.
        gallery: Data that only widens the gallery.
        zero_shot_field: Metadata field to measure zero-shot accuracy on.
        advance: Called with the number of pairs done.
    """

    def encode(sets: Sequence[ShardDataset]) -> list[Encoded]:
        return [encode_pairs(model, EvalBatches(data, content_of(model)), advance) for data in sets]

    encoded = {name: Encoded.join(encode(sets)) for name, sets in query_sets.items()}
    everything = Encoded.join([*encoded.values(), *encode(gallery)])
    result: dict[str, Any] = {}
    for name, pairs in encoded.items():
        result[name] = retrieval(pairs, everything) | {"loss": round(pair_loss(model, pairs), 4)}
        if zero_shot_field:
            result[name]["zero_shot"] = zero_shot_accuracy(model, pairs, zero_shot_field)
        if pairs.faults:
            result[name]["faults"] = group_faults(pairs.faults)
    return result


def shard_digests(data: Dataset) -> list[str]:
    """One short digest per shard over its samples' keys and sizes, to tell seen data from unseen."""
    if isinstance(data, LineDataset):
        return [entry["digest"][:16] for entry in data.manifest()]
    digests = []
    for shard in data.shards:
        samples = [
            [sample.key, *((ext, span[1]) for ext, span in sample.members.items())]
            for sample in shard.samples
        ]
        digests.append(hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:16])
    return digests


def live_report(model: DualEncoder, batches: Sequence[Pairs], field: str | None) -> dict[str, Any]:
    """What is measured during training: the held-out pairs among themselves."""
    pairs = encode_pairs(model, batches)
    figures = retrieval(pairs, pairs) | {"loss": round(pair_loss(model, pairs), 4)}
    if field:
        figures["zero_shot"] = zero_shot_accuracy(model, pairs, field)
    return figures


def evaluate_model(
    name: str,
    data: Sequence[str],
    *,
    gallery: Sequence[str] = (),
    untrained: bool = True,
    zero_shot_field: str | None = None,
    device: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """What `clipkit evaluate` reports.

    Args:
        name: A model folder or pretrained name.
        data: Shards to query with. Each shard that the model was trained on counts as `seen`, all others as
            `heldout`.
        gallery: Shards that only widen the gallery.
        untrained: Also report the same model with random weights from the run's seed (models that clipkit
            trained only).
        zero_shot_field: Metadata field to measure zero-shot accuracy on.
        device: Where to encode, as `load_model` takes it.
        advance: Called with the number of pairs done.

    Returns:
        `{"model", "heldout"?: {"text_to_image": {"recall@1", …}, "image_to_text": {…}, "queries",
        "gallery", "loss"}, "seen"?: {…}, "untrained"?: {"heldout"?: {…}, "seen"?: {…}}}`.
    """
    model = load_model(name, device)
    folder = model_folder(name)
    training = read_manifest(folder, "model", verify=False).get("training", {}) if folder.is_dir() else {}
    queries, others = (_distinct(paths) for paths in (data, gallery))
    trained_on = set(training.get("shards", ()))
    sets: dict[str, list[ShardDataset]] = {}
    for path in queries:
        shard = ShardDataset([path])
        split = "seen" if trained_on & set(shard_digests(shard)) else "heldout"
        sets.setdefault(split, []).append(shard)
    wider = [ShardDataset([path]) for path in others if path not in queries]
    models = {"": model}
    if untrained and training:
        models["untrained"] = build_model(model.config, seed=training["seed"]).to(model.device)
    result: dict[str, Any] = {"model": name}
    for label, judged in models.items():
        figures = report(judged, sets, wider, zero_shot_field=zero_shot_field, advance=advance)
        result |= {label: figures} if label else figures
    return result


def _distinct(specs: Sequence[str]) -> list[Path | str]:
    """The shards of several sources, each once."""
    shards = [path for spec in specs for path in resolve_shards(spec)]
    return list(dict.fromkeys(path.resolve() if isinstance(path, Path) else path for path in shards))
