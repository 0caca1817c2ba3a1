"""The second stage of semi-supervised training: encoder and a new linear head, on a share of the labels.

The first stage has seen all samples and no label. Here the encoder moves slowly, the head fast, and nothing
is chosen by looking at held-out data: there is one figure, after the last step.

Shapes: N samples, S side in pixels, D features, C classes.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import InputError
from clipkit.models import Encoder, seeded
from clipkit_data.batches.content import Content, Pictures
from clipkit_data.batches.pairs import Dataset, EvalBatches, Samples
from clipkit_data.batches.reads import content_of
from clipkit_data.pictures.augment import AugmentConfig, augment
from clipkit_data.records import RecordError, SampleFault
from clipkit_training.judge.labels import code_labels, label_text, stratified

CROPS = AugmentConfig(area=(0.5, 1), aspect=(3 / 4, 4 / 3))


class Classifier(nn.Module):
    """An encoder with a linear head on features that constants bring to mean 0 and length √D.

    The scale of features is the method's that trained them; without the constants no rate would fit all.
    The head starts at zero.
    """

    def __init__(self, encoder: Encoder, features_ND: Tensor, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean_D = nn.Buffer(features_ND.mean(dim=0))
        self.scale = nn.Buffer((features_ND - self.mean_D).square().mean().sqrt().clamp(min=1e-12))
        with seeded(0):  # the random state stays as it is
            self.head = nn.Linear(features_ND.shape[1], classes)
        self.head.to(features_ND.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_N3SS: Tensor) -> Tensor:
        return self.head((self.encoder.encode(images_N3SS) - self.mean_D) / self.scale)


def finetune(
    encoder: Encoder,
    train: Dataset,
    heldout: Dataset,
    *,
    label: str,
    share: float = 1.0,
    epochs: int = 30,
    min_steps: int = 200,
    batch_size: int = 64,
    lr: float = 3e-4,
    head_lr: float = 3e-3,
    crops: AugmentConfig | None = CROPS,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Train a copy of an encoder with a new head, and judge it on held-out data.

    AdamW with a cosine to zero and no warm-up, so that the first epochs count; papers take SGD with rates
    tuned for each network. The labelled pictures are held in memory.

    Args:
        encoder: An image encoder; it is not changed.
        train: Samples of which a share gives its labels; the others are not used.
        heldout: Samples to be judged on; classes that training lacks are errors.
        label: Metadata field that names the class.
        share: Of the labels, the same of each class and at least one.
        epochs: Passes over the labelled samples; more where they make fewer than `min_steps` steps.
        min_steps: What a head needs to get anywhere; few labels make few steps.
        batch_size: Most samples of a step.
        lr: Rate of the encoder.
        head_lr: Rate of the head.
        crops: How training pictures are changed; None leaves them. Clips stay as they are.
        seed: Of the share, the order and the crops.
        advance: Called with the number of samples done.

    Returns:
        `{"accuracy", "labels", "heldout"}`.

    Raises:
        InputError: No image encoder.
        DataError: Fewer than 2 classes, or samples without the label only.

    References:
        Chen et al. 2020, "A simple framework for contrastive learning of visual representations", section 6
        and appendix B.5: from the first layer on, random crops, no regularisation, no warm-up.
    """
    if encoder.modality != "image":
        raise InputError(f"fine-tuning is for image encoders, this one encodes {encoder.modality}s")
    places, names = _labelled(train, label)
    held = _labelled(heldout, label)[1]
    coded = code_labels(names, held)
    chosen = stratified(coded.train_N, share, seed)
    content = content_of(encoder)
    crops = crops if isinstance(content, Pictures) else None
    images_N3SS, kept = _pictures(train, content, [places[place] for place in chosen])
    label_N = torch.from_numpy(coded.train_N[chosen[kept]])
    epochs = max(epochs, math.ceil(min_steps / math.ceil(len(label_N) / batch_size)))
    classifier = _train(
        copy.deepcopy(encoder), images_N3SS, label_N, len(coded.classes), epochs=epochs,
        batch_size=batch_size, rates=(lr, head_lr), crops=crops, seed=seed, advance=advance,
    )  # fmt: skip
    batches = EvalBatches(heldout, content, captions=False)
    right, total = _count(
        classifier, batches, {name: at for at, name in enumerate(coded.classes)}, label, advance
    )
    return {"accuracy": right / max(1, total), "labels": len(label_N), "heldout": total}


@torch.inference_mode()
def _count(
    classifier: Classifier,
    batches: EvalBatches,
    number: dict[str, int],
    label: str,
    advance: Callable[[int], None],
) -> tuple[int, int]:
    """How many samples it names rightly, and how many there are; those without the label do not count."""
    right = total = 0
    for batch in batches:
        truth = [label_text(record.meta.get(label)) for record in batch.records]
        if batch.records:
            predicted = classifier(batch.images.to(classifier.encoder.device)).argmax(dim=1).tolist()
            known = [(number.get(name, -1), at) for at, name in enumerate(truth) if name is not None]
            right += sum(wanted == predicted[at] for wanted, at in known)
            total += len(known)
        advance(len(batch.records))
    return right, total


def _labelled(data: Dataset, label: str) -> tuple[list[int], list[str]]:
    """Positions and labels of the samples that have one; pictures are not decoded."""
    places, names = list[int](), list[str]()
    for position in range(len(data)):
        try:
            name = label_text(data[position].meta.get(label))
        except RecordError:
            continue
        if name is not None:
            places.append(position)
            names.append(name)
    return places, names


def _pictures(data: Dataset, content: Content, places: list[int]) -> tuple[Tensor, list[int]]:
    """The pictures at some positions, and which of these could be read."""
    samples = Samples(data, content, captions=False)
    found = [(at, samples.load(position)) for at, position in enumerate(places)]
    good = [(at, one[0]) for at, one in found if not isinstance(one, SampleFault)]
    return content.stack([picture for _, picture in good]), [at for at, _ in good]


def _train(
    encoder: Encoder, images_N3SS: Tensor, label_N: Tensor, classes: int, *, epochs: int, batch_size: int,
    rates: tuple[float, float], crops: AugmentConfig | None, seed: int, advance: Callable[[int], None],
) -> Classifier:  # fmt: skip
    """The trained classifier, in eval mode."""
    device = encoder.device
    encoder.eval().requires_grad_(True)
    with torch.no_grad():
        features_ND = torch.cat([encoder.encode(part.to(device)) for part in images_N3SS.split(batch_size)])
    classifier = Classifier(encoder, features_ND, classes)
    groups = [
        {"params": list(encoder.parameters()), "lr": rates[0]},
        {"params": list(classifier.head.parameters()), "lr": rates[1]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = math.ceil(len(label_N) / batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    classifier.train()
    for epoch in range(epochs):
        order_N = torch.randperm(len(label_N), generator=generator)
        for rows in order_N.tensor_split(steps):  # of like size: no batch of one sample
            images = images_N3SS[rows].to(device)
            if crops is not None:
                epoch_N = np.full(len(rows), epoch)
                images = augment(images, crops, seed=seed, epoch_N=epoch_N, id_N=rows.numpy())
            optimizer.zero_grad()
            F.cross_entropy(classifier(images), label_N[rows].to(device)).backward()
            optimizer.step()
            scheduler.step()
            advance(len(rows))
    return classifier.eval()
