"""An encoder's report on real shards: what is read, what is left out, what each figure must be."""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from webdataset.writer import TarWriter

from clipkit.cli.output import print_table
from clipkit.errors import ConfigError, DataError, InputError, NotFoundError
from clipkit.losses import alignment
from clipkit.models import Encoder, EncoderConfig, build_model, save_model
from clipkit_data.batches.pairs import EvalBatches, Pairs
from clipkit_data.dataset import ShardDataset
from clipkit_data.pictures.views import family, make_views
from clipkit_data.records import Record
from clipkit_data.sources import resolve_shards
from clipkit_training.judge.encoders import encoder_table, find_run, is_encoder, judge_encoder
from clipkit_training.judge.features import encoded, read_features, untrained
from clipkit_training.judge.finetune import finetune
from clipkit_training.judge.live import report_live, same_label_pairs
from clipkit_training.judge.raw import raw
from clipkit_training.judge.report import report_encoder

SIDE = 16
HUES = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (110, 110, 110)}
CONFIG = EncoderConfig.model_validate(
    {
        "tower": {"name": "cnn", "widths": [8, 16], "depths": [1, 1], "stem": 2, "groups": 4},
        "preprocess": {"size": SIDE, "resize": "squash"},
    }
)


def square(hue: str, seed: int) -> bytes:
    """A picture (PNG) of one colour with noise; the seed's parity makes it dark or bright."""
    noise = np.random.default_rng(seed).normal(0, 12, (SIDE, SIDE, 3))
    pixels = np.array(HUES[hue]) + noise + (25 if seed % 2 else -25)
    buffer = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: Sequence[tuple[bytes, dict[str, Any] | None]]) -> ShardDataset:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for place, (picture, meta) in enumerate(samples):
            text = {} if meta is None else {"json": json.dumps(meta).encode()}
            writer.write({"__key__": f"{place:05d}", "png": picture, "txt": b"a square", **text})
    return ShardDataset([path])


def squares(
    per_hue: int, first: int, hues: Sequence[str] = tuple(HUES)
) -> list[tuple[bytes, dict[str, Any]]]:
    seeds = range(first, first + per_hue)
    return [(square(hue, seed), {"hue": hue, "bright": seed % 2 == 1}) for seed in seeds for hue in hues]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardDataset, ShardDataset]:
    """Coloured squares: 48 to learn from and 32 held out."""
    root = tmp_path_factory.mktemp("squares")
    train = write_shard(root / "train/00000.tar", squares(12, 0))
    return train, write_shard(root / "heldout/00000.tar", squares(8, 100))


@pytest.fixture
def encoder() -> Encoder:
    return build_model(CONFIG, seed=0)


def batches(data: ShardDataset, **options: Any) -> EvalBatches:
    return EvalBatches(data, CONFIG.preprocess, captions=False, **options)


def test_features_are_the_encoders_whatever_the_batches(
    shards: tuple[ShardDataset, ShardDataset], encoder: Encoder
) -> None:
    train, _ = shards
    done: list[int] = []
    found = read_features(
        batches(train, batch_size=7), {"": encoded(encoder), "raw": raw(encoder)}, "hue", done.append
    )
    (whole,) = batches(train, batch_size=100)
    with torch.no_grad():
        torch.testing.assert_close(found[""].x_ND, encoder.eval().encode(whole.images))
    assert torch.equal(found["raw"].x_ND, whole.images.flatten(1) / 255)
    assert found[""].labels == list(HUES) * 12
    assert sum(done) == 48


def test_an_encoder_keeps_its_mode_and_is_judged_without_dropout(encoder: Encoder) -> None:
    noisy = untrained(encoder, 0).train()
    noisy.tower.add_module("blocks", torch.nn.Sequential(*noisy.tower.blocks, torch.nn.Dropout(0.9)))  # pyright: ignore
    batch = Pairs(torch.randint(0, 255, (4, 3, SIDE, SIDE), dtype=torch.uint8), [], torch.arange(4), [])
    with torch.no_grad():
        assert torch.equal(encoded(noisy)(batch), encoded(noisy)(batch))
    assert noisy.training


def test_an_untrained_encoder_is_new_and_the_same_for_a_seed(encoder: Encoder) -> None:
    assert untrained(encoder, 0).fingerprint == encoder.fingerprint
    assert untrained(encoder, 1).fingerprint != encoder.fingerprint


def test_large_pictures_count_with_64_pixels_a_side(encoder: Encoder) -> None:
    images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    images[:, :, :2, :2] = 255
    records = [Record((0, i), str(i), b"", None) for i in range(2)]
    x_ND = raw(encoder)(Pairs(images, records, torch.arange(2), []))
    assert x_ND.shape == (2, 3 * 64 * 64)
    assert x_ND.sum(dim=1).tolist() == [3, 3], "one pixel is white, the mean of four"


def test_raw_sentences_are_near_where_they_share_letters() -> None:
    encoder = build_model(
        EncoderConfig.model_validate(
            {"modality": "text", "tower": {"name": "transformer", "width": 16, "layers": 1, "heads": 2}}
        ),
        seed=0,
    )
    texts = ["a red circle", "one red circle", "猫と犬"]
    records = [Record((0, i), str(i), b"", text) for i, text in enumerate(texts)]
    batch = Pairs(torch.zeros(3, 0), records, torch.arange(3), [])
    x_ND = raw(encoder)(batch)
    torch.testing.assert_close(x_ND.norm(dim=1), torch.ones(3))
    assert x_ND[0] @ x_ND[1] > 0.6 > 0.1 > x_ND[0] @ x_ND[2]
    with torch.no_grad():
        assert encoded(encoder)(batch).shape == (3, 16)


def test_samples_without_the_label_or_the_picture_are_left_out_and_counted(
    tmp_path: Path, encoder: Encoder
) -> None:
    samples: list[tuple[bytes, dict[str, Any] | None]] = [
        (square("red", 0), {"hue": "red"}),
        (b"no picture", {"hue": "red"}),
        (square("red", 1), {"hue": " "}),
        (square("red", 2), None),
        (square("red", 3), {"hue": ["red"]}),
        (square("blue", 4), {"hue": "blue"}),
    ]
    data = write_shard(tmp_path / "x.tar", samples)
    found = read_features(batches(data, batch_size=2), {"": encoded(encoder)}, "hue")[""]
    assert found.labels == ["red", "blue"]
    assert len(found.x_ND) == len(found.records) == 2
    assert sorted(found.faults) == ["no hue"] * 3 + [found.faults[0]]


def test_a_missing_label_says_which_fields_there_are(
    shards: tuple[ShardDataset, ShardDataset], encoder: Encoder, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no sample has the field 'colour'.*\(there are bright, hue\)"):
        read_features(batches(shards[0]), {"": encoded(encoder)}, "colour")
    bare = write_shard(tmp_path / "x.tar", [(square("red", 0), None)])
    with pytest.raises(DataError, match=r"field 'hue': the samples have no metadata"):
        read_features(batches(bare), {"": encoded(encoder)}, "hue")
    broken = write_shard(tmp_path / "y.tar", [(b"no picture", {"hue": "red"})])
    with pytest.raises(DataError, match=r"no sample to judge on; the first: .*00000"):
        read_features(batches(broken), {"": encoded(encoder)}, "hue")


def test_features_that_are_no_numbers_are_refused(
    shards: tuple[ShardDataset, ShardDataset], encoder: Encoder
) -> None:
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="nan or infinite"):
        report_encoder(encoder, *shards, label="hue")


def test_a_report_has_every_figure_beside_untrained_and_raw(
    shards: tuple[ShardDataset, ShardDataset], encoder: Encoder
) -> None:
    found = report_encoder(encoder, *shards, label="hue", ks=(200, 5))
    accuracies = {"knn", "knn@5", "linear", "linear_top5", "linear_1pct", "linear_10pct"}
    spreads = {"linear_1pct_std", "linear_10pct_std"}
    shape = {"rankme", "embedding_std", "alignment", "uniformity"}
    facts: dict[str, Any] = {"k": 48, "classes": 4, "train": 48, "heldout": 32, "unseen": 0, "label": "hue"}
    facts |= {"probe": "logistic", "temperature": 0.07}
    assert set(found) == accuracies | spreads | shape | set(facts) | {"alignment_of", "untrained", "raw"}
    assert set(found["untrained"]) == accuracies | spreads | shape
    assert set(found["raw"]) == accuracies | spreads
    assert {name: found[name] for name in facts} == facts
    assert found["alignment_of"] == "labels"
    assert found["raw"]["linear"] == found["raw"]["knn@5"] == 1.0, "colours are told apart by pixels"
    assert {name: found[name] for name in accuracies} == {
        name: found["untrained"][name] for name in accuracies
    }
    json.dumps(found, allow_nan=False)
    assert report_encoder(encoder, *shards, label="hue", ks=(200, 5)) == found, "it repeats itself"


def test_another_field_makes_it_a_transfer_probe(
    shards: tuple[ShardDataset, ShardDataset], encoder: Encoder
) -> None:
    found = report_encoder(encoder, *shards, label="bright", baselines=False)
    assert (found["classes"], found["label"]) == (2, "bright")
    assert found["linear"] > 0.8, "chance is 0.5"
    assert "raw" not in found
    assert "untrained" not in found


def test_held_out_classes_that_training_lacks_count_as_errors(
    shards: tuple[ShardDataset, ShardDataset], encoder: Encoder, tmp_path: Path
) -> None:
    fewer = write_shard(tmp_path / "x.tar", squares(12, 0, ["red", "green"]))
    found = report_encoder(encoder, fewer, shards[1], label="hue", baselines=True)
    assert (found["classes"], found["unseen"]) == (2, 16)
    assert found["raw"]["linear"] == found["raw"]["knn"] == 0.5


def test_alignment_is_that_of_two_views_where_the_recipe_has_them(
    shards: tuple[ShardDataset, ShardDataset], encoder: Encoder
) -> None:
    views = family("moco_v2", 8)
    found = report_encoder(encoder, *shards, label="hue", views=views, baselines=False, seed=3)
    (whole,) = batches(shards[1])
    zero = np.zeros(len(whole.records), dtype=np.int64)
    made = make_views(whole.images, views, seed=3, epoch_N=zero, id_N=whole.sample_ids.numpy())
    with torch.no_grad():
        a_ND, b_ND = (encoder.eval().encode(view) for view in made)
    assert found["alignment"] == pytest.approx(float(alignment(a_ND, b_ND)), abs=1e-4)
    assert found["alignment_of"] == "views"


def test_samples_of_a_class_are_paired_in_a_circle() -> None:
    assert same_label_pairs(["a", "b", "a", "c", "a", "b"]) == ([0, 2, 4, 1, 5], [2, 4, 0, 5, 1])
    assert same_label_pairs(["", "", "a"]) == ([], [])


def test_live_figures_are_the_reports(shards: tuple[ShardDataset, ShardDataset], encoder: Encoder) -> None:
    train, heldout = (list(batches(data, batch_size=20)) for data in shards)
    live = report_live(encoder, train, heldout, label="hue", ks=(5,))
    whole = report_encoder(encoder, *shards, label="hue", ks=(5,), baselines=False)
    assert live.keys() == {"knn", "k", "heldout", "rankme", "embedding_std", "alignment", "uniformity"}
    assert live == {name: pytest.approx(whole[name], abs=1e-4) for name in live}
    blind = report_live(encoder, [], heldout, label=None, views=family("moco_v2"))
    assert blind.keys() == {"heldout", "rankme", "embedding_std", "alignment", "uniformity"}


def test_fine_tuning_learns_from_few_labels_and_leaves_the_encoder(
    shards: tuple[ShardDataset, ShardDataset], encoder: Encoder
) -> None:
    before, state = encoder.fingerprint, torch.random.get_rng_state()
    found = finetune(encoder, *shards, label="hue", share=0.25, min_steps=100)
    assert (found["labels"], found["heldout"]) == (12, 32)
    assert found["accuracy"] > 0.9, "chance is 0.25"
    assert encoder.fingerprint == before
    assert encoder.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert finetune(encoder, *shards, label="hue", share=0.25, min_steps=100) == found


def test_fine_tuning_moves_the_encoder_more_than_a_head_alone_does(
    shards: tuple[ShardDataset, ShardDataset], encoder: Encoder
) -> None:
    with torch.no_grad():  # features of nothing but the mean brightness cannot tell hues apart
        for parameter in encoder.tower.stem.parameters():  # pyright: ignore[reportAttributeAccessIssue]
            parameter.copy_(parameter.mean().expand_as(parameter) + 0.01)
    options: dict[str, Any] = {"label": "hue", "epochs": 30, "min_steps": 1, "crops": None}
    frozen = finetune(encoder, *shards, lr=0.0, head_lr=1e-3, **options)
    moved = finetune(encoder, *shards, lr=3e-3, head_lr=1e-3, **options)
    assert moved["accuracy"] > frozen["accuracy"]


def test_fine_tuning_is_for_pictures_alone(shards: tuple[ShardDataset, ShardDataset]) -> None:
    config = {"modality": "text", "tower": {"name": "transformer", "width": 16, "layers": 1, "heads": 2}}
    with pytest.raises(InputError, match="this one encodes texts"):
        finetune(build_model(EncoderConfig.model_validate(config), seed=0), *shards, label="hue")


@pytest.fixture
def run_folder(shards: tuple[ShardDataset, ShardDataset], encoder: Encoder, tmp_path: Path) -> Path:
    """A run as training leaves it, as far as judging reads it."""
    train, heldout = (str(Path(data.paths[0]).parent) for data in shards)
    run = tmp_path / "run"
    save_model(encoder, run / "model")
    data = {"train": train, "heldout": heldout, "label": "hue", "views": {"family": "moco_v2", "size": SIDE}}
    recipe = {"step": "simclr", "model": encoder.config.model_dump(mode="json"), "data": data, "max_steps": 1}
    (run / "config.yaml").write_text(json.dumps(recipe))
    return run


def test_a_run_folder_says_what_to_judge_on(run_folder: Path) -> None:
    found = judge_encoder(str(run_folder))
    assert (found["train"], found["heldout"], found["label"]) == (48, 32, "hue")
    assert found["alignment_of"] == "views"
    of_model = judge_encoder(str(run_folder / "model"), label="bright", baselines=False)
    assert (of_model["label"], of_model["classes"]) == ("bright", 2)
    assert is_encoder(str(run_folder))
    assert find_run(str(run_folder)) == (str(run_folder / "model"), run_folder)
    assert not is_encoder("open_clip:ViT-B-32/openai")
    with pytest.raises(NotFoundError, match="no such run or model folder: gone"):
        judge_encoder("gone")


def test_a_model_without_a_run_needs_to_be_told(
    run_folder: Path, shards: tuple[ShardDataset, ShardDataset], encoder: Encoder, tmp_path: Path
) -> None:
    save_model(encoder, tmp_path / "alone/model")
    name, (train, heldout) = str(tmp_path / "alone/model"), ([data.paths[0]] for data in shards)
    with pytest.raises(ConfigError, match=r"no held-out data is known \(give --data\)"):
        judge_encoder(name)
    with pytest.raises(ConfigError, match=r"no training data is known \(give --train-data\)"):
        judge_encoder(name, data=heldout, label="hue")
    shape = judge_encoder(name, data=heldout)
    assert {"rankme", "embedding_std", "uniformity"} <= set(shape), "these need no label"
    assert "knn" not in shape
    assert set(shape["untrained"]) == set(shape) - {"model", "untrained"}
    found = judge_encoder(name, data=heldout, train_data=train, label="hue", shares=(10,), baselines=False)
    assert found["finetune_10pct"] > 0.5, "chance is 0.25"
    assert resolve_shards(heldout[0])


def test_the_table_shows_every_figure(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = judge_encoder(str(run_folder), ks=(200, 5))
    print_table(*encoder_table(found))
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["trained"] == ["trained", "untrained", "raw"]
    assert lines["knn"][1:] == [
        f"{found[k]['knn'] if k else found['knn']:.4f}" for k in ("", "untrained", "raw")
    ]
    assert lines["linear_1pct"][1:4] == [
        f"{found['linear_1pct']:.4f}",
        "±",
        f"{found['linear_1pct_std']:.4f}",
    ]
    assert len(lines["uniformity"]) == 3, "raw pixels have none"
    assert lines["classes"] == ["classes", "4"]
    assert {"knn@5", "linear", "rankme", "embedding_std", "alignment", "unseen", "k", "label"} <= lines.keys()


def test_raw_graphs_are_their_sizes_and_degrees(encoder: Encoder) -> None:
    geometric = pytest.importorskip("torch_geometric.data")
    triangle = torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]])
    lonely = torch.empty(2, 0, dtype=torch.int64)
    graphs = geometric.Batch.from_data_list(
        [geometric.Data(edge_index=triangle, num_nodes=3), geometric.Data(edge_index=lonely, num_nodes=2)]
    )
    encoder.modality = "graph"
    records = [Record((0, i), str(i), b"", None) for i in range(2)]
    x_ND = raw(encoder)(Pairs(graphs, records, torch.arange(2), []))
    nodes, pairs = (torch.tensor(counts).log1p() / 10 for counts in ([3.0, 2.0], [6.0, 0.0]))
    torch.testing.assert_close(x_ND[:, :3], torch.stack([nodes, pairs, torch.tensor([1.0, 0.0])], dim=1))
    assert x_ND[:, 3:].argmax(dim=1).tolist() == [2, 0]
    torch.testing.assert_close(F.normalize(x_ND[:, 3:], p=1).sum(dim=1), torch.ones(2))
