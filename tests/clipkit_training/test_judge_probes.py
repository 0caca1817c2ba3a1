"""Probes on blobs with known answers: labels, linear layers, support vector machines, sentences."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from clipkit.errors import ClipkitError, DataError, InputError, NotFoundError
from clipkit.models import Encoder, EncoderConfig, build_model
from clipkit_training.judge.features import Features
from clipkit_training.judge.labels import code_labels, label_text, stratified
from clipkit_training.judge.linear import logistic_probe, moco_probe, sgd_probe
from clipkit_training.judge.sentences import ScoredPair, embed_texts, read_scored_pairs, spearman, sts
from clipkit_training.judge.svm import svm_accuracy
from clipkit_training.judge.wordings import wordings_recall


def blobs(
    per_class: int, classes: int = 4, dim: int = 8, noise: float = 0.3, seed: int = 0, scale: float = 1.0
) -> Features:
    """Normal clouds around corners of a simplex, shifted away from zero."""
    g = torch.Generator().manual_seed(seed)
    label_N = torch.arange(classes).repeat(per_class)
    x_ND = torch.eye(classes, dim)[label_N] + noise * torch.randn(len(label_N), dim, generator=g)
    return Features(scale * (x_ND + 5), [f"class {label}" for label in label_N.tolist()])


def shuffled(features: Features, seed: int = 0) -> Features:
    """The same features with labels that mean nothing."""
    labels = np.random.default_rng(seed).permutation(features.labels).tolist()
    return Features(features.x_ND, labels)


def ring(count: int) -> Features:
    """A disc within a ring: no line parts them, a circle does."""
    angle_N = np.linspace(0, 2 * np.pi, count, endpoint=False)
    radius_N = np.where(np.arange(count) % 2 == 0, 0.3, 1.0)
    x_N2 = np.stack([radius_N * np.cos(angle_N), radius_N * np.sin(angle_N)], axis=1)
    return Features(torch.from_numpy(x_N2).float(), [("inside", "outside")[i % 2] for i in range(count)])


def test_values_that_name_a_class() -> None:
    values = ["a ", 7, True, False, "", "  ", None, 1.5, ["a"], {"a": 1}]
    assert [label_text(value) for value in values] == ["a", "7", "true", "false", *[None] * 6]


def test_labels_are_numbered_and_unseen_ones_are_kept() -> None:
    coded = code_labels(["b", "a", "b"], ["a", "c", "b", "c"])
    assert coded.classes == ["a", "b"]
    assert coded.train_N.tolist() == [1, 0, 1]
    assert coded.heldout_N.tolist() == [0, -1, 1, -1]
    assert coded.unseen == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**31),
)
def test_a_share_holds_each_class_alike(counts: list[int], share: float, seed: int) -> None:
    label_N = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    drawn = stratified(label_N, share, seed)
    assert np.bincount(label_N[drawn]).tolist() == [max(1, round(share * count)) for count in counts]
    assert len(np.unique(drawn)) == len(drawn)
    assert np.array_equal(drawn, stratified(label_N, share, seed))


def test_a_share_is_another_one_for_another_seed() -> None:
    label_N = np.repeat([0, 1], 50)
    assert not np.array_equal(stratified(label_N, 0.1, 0), stratified(label_N, 0.1, 1))


def test_probes_find_classes_that_a_plane_parts_and_no_others() -> None:
    train, heldout = blobs(50), blobs(50, seed=1)
    for probe in (logistic_probe, partial(sgd_probe, epochs=30)):
        assert probe(train, heldout)["top1"] > 0.9
        assert probe(train, heldout)["top5"] == 1.0, "there are four classes"
        assert probe(shuffled(train), heldout)["top1"] < 0.45, "chance is 0.25"
        assert probe(ring(100), ring(100))["top1"] < 0.7, "no line parts a ring from its inside"


@pytest.mark.parametrize("dim", [5, 300])
def test_the_logistic_probe_is_scikit_learns(dim: int) -> None:
    train, heldout = blobs(20, dim=dim, noise=0.6), blobs(100, dim=dim, noise=0.6, seed=1)
    scaler = StandardScaler().fit(train.x_ND)
    reference = LogisticRegression(C=0.01, max_iter=1000, tol=1e-8).fit(
        scaler.transform(train.x_ND), train.labels
    )
    expected = reference.score(scaler.transform(heldout.x_ND), heldout.labels)
    assert logistic_probe(train, heldout, cs=[0.01])["top1"] == pytest.approx(expected, abs=0.011)


def test_c_is_chosen_where_it_matters() -> None:
    train, heldout = blobs(60, dim=100, noise=0.3), blobs(100, dim=100, noise=0.3, seed=1)
    other = shuffled(train).labels
    noisy = Features(train.x_ND, [other[i] if i % 3 == 0 else name for i, name in enumerate(train.labels)])
    low, high = (logistic_probe(noisy, heldout, cs=[c])["top1"] for c in (1e-3, 1e3))
    assert low > high + 0.05, "a weak penalty learns the wrong labels by heart"
    assert logistic_probe(noisy, heldout, cs=(1e3, 1e-3))["top1"] == low


def test_few_labels_are_worth_less_and_are_counted() -> None:
    train, heldout = blobs(200, noise=0.5), blobs(100, noise=0.5, seed=1)
    few = logistic_probe(train, heldout, share=0.01, draws=3)
    assert (few["labels"], few["std"] > 0) == (8, True)
    assert few["top1"] < logistic_probe(train, heldout)["top1"]
    one_each = logistic_probe(train, heldout, share=0.001, draws=3)
    assert one_each["labels"] == 4, "one of each class at least"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("options", [{}, {"schedule": "steps"}, {"batch_norm": True}], ids=str)
def test_the_sgd_probe_fits_features_of_any_scale(scale: float, options: dict[str, Any]) -> None:
    train, heldout = blobs(40, scale=scale), blobs(40, scale=scale, seed=1)
    assert sgd_probe(train, heldout, epochs=30, **options)["top1"] > 0.9


def test_the_sgd_probe_repeats_itself_and_leaves_the_random_state() -> None:
    train, heldout = blobs(40, noise=0.6), blobs(40, noise=0.6, seed=1)
    state = torch.random.get_rng_state()
    first = sgd_probe(train, heldout, epochs=5, lr=1.0, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sgd_probe(train, heldout, epochs=5, lr=1.0, seed=3) == first


def test_mocos_probe_takes_shares_of_the_labels_as_the_logistic_one_does() -> None:
    train, heldout = blobs(50, noise=0.6), blobs(50, noise=0.6, seed=1)
    whole = moco_probe(train, heldout, seed=2)
    assert whole == sgd_probe(train, heldout, schedule="steps", seed=2) | {"std": 0.0, "labels": 200}
    few = moco_probe(train, heldout, share=0.02, draws=3)
    assert (few["labels"], few["std"] > 0) == (4, True)
    assert few["top1"] < whole["top1"]


def test_one_sample_over_a_full_batch_is_no_batch_of_its_own() -> None:
    train = blobs(3, classes=3)
    assert sgd_probe(train, train, batch_size=8, batch_norm=True, epochs=20)["top1"] > 0.9


def test_classes_that_training_lacks_are_errors() -> None:
    train, heldout = blobs(30), blobs(30, seed=1)
    strange = Features(
        torch.cat([heldout.x_ND] * 2), [*heldout.labels, *(f"new {label}" for label in heldout.labels)]
    )
    for probe in (logistic_probe, partial(sgd_probe, epochs=10)):
        assert probe(train, strange)["top1"] == pytest.approx(probe(train, heldout)["top1"] / 2)


def test_probes_need_two_classes_and_one_in_common() -> None:
    one = Features(torch.ones(3, 2), ["a"] * 3)
    with pytest.raises(DataError, match=r"1 classes, only 'a'"):
        logistic_probe(one, one)
    with pytest.raises(
        DataError, match=r"no class in common: 'class 0', 'class 1', 'class 2', … \(4\) there, 'a'"
    ):
        sgd_probe(blobs(2), Features(torch.ones(3, 8), ["a"] * 3))


def test_an_sgd_probe_that_diverges_says_so() -> None:
    with pytest.raises(InputError, match=r"diverged at lr"):
        sgd_probe(blobs(40), blobs(4), lr=1e30, epochs=20, weight_decay=1.0)


def test_an_svm_parts_a_ring_from_its_inside() -> None:
    found = ring(60)
    figures = svm_accuracy(found.x_ND, found.labels, folds=5, seeds=(0, 1), cs=(0.1, 10.0))
    assert figures["accuracy"] > 0.95
    noise = shuffled(blobs(20, classes=2))
    figures = svm_accuracy(noise.x_ND, noise.labels, folds=5, seeds=(0, 1), cs=(1.0,))
    assert figures["accuracy"] < 0.75
    assert figures["std"] > 0


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (np.ones((3, 2)), ["a"] * 3, "1 classes"),
        (np.ones((24, 2)), ["a"] * 20 + ["b"] * 4, "class 'b' has 4 samples, fewer than 10 folds"),
        (np.full((20, 2), np.nan), ["a", "b"] * 10, "nan or infinite"),
    ],
)
def test_what_an_svm_cannot_judge(x: np.ndarray, labels: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        svm_accuracy(x, labels)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), n=st.integers(3, 30))
def test_spearman_is_scipys_also_with_ties(seed: int, n: int) -> None:
    g = np.random.default_rng(seed)
    x, y = g.integers(0, 5, n).astype(float), g.integers(0, 5, n).astype(float)
    x[:2] = y[:2] = [0, 1]
    expected: Any = spearmanr(x, y)
    assert spearman(x, y) == pytest.approx(expected.statistic)
    assert spearman(np.exp(x), 3 * y - 7) == pytest.approx(spearman(x, y)), "only ranks count"


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2, 3], "one length"),
        ([1], [1], "one length"),
        ([1, np.nan], [1, 2], "nan"),
        ([1, 2], [3, 3], "second list are equal"),
    ],
)
def test_what_ranks_nothing(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spearman(x, y)


PAIRS = [
    ScoredPair("a cat", 'a "small" cat', 4.5),
    ScoredPair("a cat", "a dog", 2.0),
    ScoredPair("猫", "the stock market, today", 0.0),
]


def test_scored_pairs_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    head = "id\tsentence1\tsentence2\tscore\n"
    lines = [f"{i}\t{a}\t{b}\t{score}\n" for i, (a, b, score) in enumerate(PAIRS)]
    (tmp_path / "x.tsv").write_text(head + "".join(lines), encoding="utf-8")
    rows = [json.dumps(pair._asdict(), ensure_ascii=False) for pair in PAIRS]
    (tmp_path / "x.jsonl").write_text("\n".join([*rows, ""]), encoding="utf-8")
    quoted = [f'"{a}","{b.replace(chr(34), chr(34) * 2)}",{score}\n' for a, b, score in PAIRS]
    (tmp_path / "x.csv").write_text("sentence1,sentence2,score\n" + "".join(quoted), encoding="utf-8-sig")
    for name in ("x.tsv", "x.jsonl", "x.csv"):
        assert read_scored_pairs(tmp_path / name) == PAIRS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", b"sentence1\tsentence2\tscore\na\tb\t1\na\tb\n", r"x.tsv, line 3: no score"),
        ("x.tsv", b"first\tsentence2\tscore\na\tb\t1\n", r"line 2: no sentence1 .the columns are"),
        ("x.tsv", b"sentence1\tsentence2\tscore\na\tb\thigh\n", r"line 2: the score 'high' is no number"),
        ("x.tsv", b"sentence1\tsentence2\tscore\na\tb\tnan\n", r"line 2: the score 'nan' is no number"),
        ("x.tsv", b"sentence1\tsentence2\tscore\n\xff\xfe\tb\t1\n", r"line 1 or later cannot be read"),
        ("x.jsonl", b'{"sentence1": "a"\n', r"x.jsonl, line 1: no JSON"),
        ("x.jsonl", b"[1]\n", r"line 1: no sentence1 and no sentence2 and no score"),
        ("x.jsonl", b"", r"x.jsonl holds no pair"),
    ],
)
def test_files_that_are_no_pairs_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_scored_pairs(tmp_path / name)


def test_a_missing_file_of_pairs_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no such file: .*gone.tsv"):
        read_scored_pairs(tmp_path / "gone.tsv")


def text_encoder() -> Encoder:
    return build_model(
        EncoderConfig(
            modality="text",
            tower={"name": "transformer", "width": 32, "layers": 1, "heads": 2},
            tokenizer={"name": "clip", "context_length": 16},
        ),
        seed=0,
    )


def test_sentences_are_ranked_as_their_cosines_are() -> None:
    encoder = text_encoder()
    words = ["red circle", "blue square", "a cat on a mat", "one more very long sentence than the others"]
    sides = [(a, b) for place, a in enumerate(words) for b in words[place + 1 :]]
    cosines = [float(embed_texts(encoder, [a])[0] @ embed_texts(encoder, [b])[0]) for a, b in sides]
    in_order = [ScoredPair(a, b, score) for (a, b), score in zip(sides, cosines, strict=True)]
    backwards = [pair._replace(score=-pair.score) for pair in in_order]
    found = sts(partial(embed_texts, encoder), {"up": in_order, "down": backwards})
    assert found == {"up": pytest.approx(1), "down": pytest.approx(-1), "mean": pytest.approx(0)}
    assert encoder.training, "it is left in the mode it was in"


@given(
    numbers=st.lists(st.integers(0, 5), min_size=2, max_size=12),
    others=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    seed=st.integers(0, 100),
)
def test_other_wordings_are_found_as_a_search_would_find_them(
    numbers: list[int], others: list[int], seed: int
) -> None:
    wordings = [(f"caption {a}", f"other {b}") for a, b in zip(numbers, others, strict=False)]
    draw = torch.from_numpy(np.random.default_rng(seed).normal(size=(10, 4))).float()
    places = {text: place for place, text in enumerate(sorted({text for pair in wordings for text in pair}))}

    def embed(texts: Any) -> torch.Tensor:
        return torch.nn.functional.normalize(draw[[places[text] for text in texts]], dim=1)

    hits = []
    for caption, own in wordings:
        distinct = sorted({other for _, other in wordings})
        hits.append(own == max(distinct, key=lambda other: float(embed([caption])[0] @ embed([other])[0])))
    found = wordings_recall(embed, wordings)
    assert found["recall@1"] == pytest.approx(np.mean(hits))
    assert found["recall@10"] == 1


def test_what_sts_cannot_judge() -> None:
    same = [ScoredPair("a", "b", 1.0), ScoredPair("a", "b", 2.0)]
    with pytest.raises(InputError, match="same: all values of the first list are equal"):
        sts(partial(embed_texts, text_encoder()), {"same": same})
    with pytest.raises(InputError, match="no task"):
        sts(partial(embed_texts, text_encoder()), {})
    pictures = build_model(EncoderConfig(tower={"name": "cnn"}), seed=0)
    with pytest.raises(ClipkitError, match="this one encodes images"):
        sts(partial(embed_texts, pictures), {"same": same})
