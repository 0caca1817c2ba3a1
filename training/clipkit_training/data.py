"""What a run reads: its sources opened, its batches, and whether a resumed run reads the same.

A checkpoint holds one integer and the digest of the order, which is over keys, places and sizes. `data.json`,
which the run folder keeps since its start, also says what the samples held, where the shards have index
files: by it a resumed run knows of other contents, and says what has changed.
"""

import json
import logging
import math
import platform
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from clipkit.errors import ArtifactError, ConfigError, DataError, InputError
from clipkit.files import atomic_write
from clipkit.models import DualEncoder, Encoder
from clipkit_data.batches.clips import Clips
from clipkit_data.batches.content import Pictures, Texts, WholePictures
from clipkit_data.batches.loader import TrainBatches
from clipkit_data.batches.order import Order
from clipkit_data.batches.quarantine import BadSample
from clipkit_data.batches.reads import content_of
from clipkit_data.batches.stream import StreamBatches
from clipkit_data.captions import CaptionSampler
from clipkit_data.dataset import ShardDataset
from clipkit_data.lines import LineDataset
from clipkit_data.records import group_faults
from clipkit_data.remote.retry import shown
from clipkit_data.sources import is_streamed, open_dataset
from clipkit_training.recipe import Recipe
from clipkit_training.world import World

log = logging.getLogger("clipkit_training")
DESCRIPTION = "data.json"
STREAM = "stream"  # in place of the digest of an order: a stream has none, and resumes as a new one
_NAMED = 5


class TrainingData:
    """The sources of a recipe, opened.

    Args:
        recipe: Its `data` and `seed` decide the order.
        world: The processes that train together; all must see the same shards.

    Raises:
        InputError: A source holds sentences alone, and the model reads something else.
        DataError: The processes see different shards.
    """

    def __init__(self, recipe: Recipe, model: DualEncoder | Encoder, world: World) -> None:
        self.recipe, self.model, self.world = recipe, model, world
        data = recipe.data
        if data.load_size is not None and data.views is None:
            raise ConfigError("data.load_size is for views, which have a size of their own: give data.views")
        self.content = content_of(model, data.load_size)
        pictures = isinstance(self.content, Pictures | WholePictures | Clips)
        if data.views is not None and not pictures:
            raise ConfigError("data.views are of pictures", hint="leave them out")
        views = data.make_views(model.preprocess.size)
        if data.load_size is not None and views and any(view.augment.turns for view in views.each):
            raise ConfigError("data.load_size is for views that are cut, not turned, sheared or shifted")
        self.augment = (views or data.augment) if pictures else None
        self.streams = is_streamed(data.train)
        specs = {} if self.streams else data.sources or {data.train: 1.0}
        opened = [(open_dataset(spec, name=shown(spec)), weight) for spec, weight in specs.items()]
        for dataset, _ in opened:
            if isinstance(dataset, LineDataset) and not isinstance(self.content, Texts):
                raise InputError(
                    f"{dataset.name} holds lines of text, the model needs more than that",
                    hint="make shards of pictures and their captions: clipkit shards pack",
                )
        opened.sort(key=lambda source: source[0].fingerprint())  # neither the file's order nor places count
        self.datasets = [dataset for dataset, _ in opened]
        self.weights = [weight for _, weight in opened] if data.sources else None
        self.samples = sum(len(dataset) for dataset in self.datasets)
        if self.streams:
            self._check_stream()
        exact = self._exact(0)
        self._plan = exact.plan if exact else None
        self.digest = exact.digest() if exact else STREAM
        seen = world.gather((self.digest, platform.node()))
        if len({digest for digest, _ in seen}) > 1:
            raise DataError(
                "the processes do not see the same shards",
                hint="compare the manifest.json of the shards (`clipkit shards index`) on each machine",
            )
        if world.main:
            self._warn_of_a_small_cache(len({machine for _, machine in seen}))

    def _warn_of_a_small_cache(self, machines: int) -> None:
        """Say so where the order goes back and forth between more remote shards than a machine may keep."""
        sources = zip(self.datasets, self._plan.sources if self._plan else (), strict=False)
        remote = [
            (data, s.order) for data, s in sources if isinstance(data, ShardDataset) and data.cache_limit
        ]
        limit = min((data.cache_limit or 0 for data, _ in remote), default=0)
        needed = sum(_bytes_at_once(data, order, machines) for data, order in remote)
        if needed <= limit:
            return
        shards = sum(len(data.paths) for data, _ in remote)
        fitting = limit * shards // sum(data.total_bytes for data, _ in remote)
        lanes, window = fitting * machines // 4, sum(len(data) for data, _ in remote) // shards
        fewer = f", or start a run that reads fewer at a time (data.lanes: {lanes}, data.window: {window})"
        log.warning(
            "the shard cache may take %.3g GB, and training goes back and forth between shards of %.3g GB: "
            "they will be fetched again and again; raise CLIPKIT_CACHE_BYTES%s",
            limit / 1e9,
            needed / 1e9,
            fewer if lanes and window else "",
        )

    def _check_stream(self) -> None:
        """Refuse what a stream does not give. Raises: ConfigError."""
        data = self.recipe.data
        if self.recipe.max_epochs is not None:
            raise ConfigError("a stream has no epochs", hint="give max_steps or max_minutes")
        if data.label or data.more_captions or not isinstance(self.content, Pictures):
            raise ConfigError(
                "a stream gives pictures of the model's size and their captions: nothing else, and no labels",
                hint="give the shards without stream:",
            )
        if data.views is not None and data.augment_on == "workers":
            raise ConfigError("a stream makes no views", hint="set data.augment_on: device")

    def batches(self, start_step: int, known_bad: Sequence[BadSample] = ()) -> TrainBatches | StreamBatches:
        """This process's batches from a step on."""
        exact = self._exact(start_step, known_bad)
        if exact is not None:
            return exact
        options = self._options(start_step, known_bad)
        return StreamBatches(self.recipe.data.train, self.model.preprocess, self.model.tokenizer, **options)

    def _exact(self, start_step: int, known_bad: Sequence[BadSample] = ()) -> TrainBatches | None:
        """The batches in their computed order; None for a stream."""
        if self.streams:
            return None
        data = self.recipe.data
        more = {"weights": self.weights, "lanes": data.lanes, "window": data.window, "cache": data.cache}
        more |= {"label": data.label, "more_captions": data.more_captions}
        options = self._options(start_step, known_bad)
        return TrainBatches(self.datasets, self.content, self.model.tokenizer, **more, **options)

    def _options(self, start_step: int, known_bad: Sequence[BadSample]) -> dict[str, Any]:
        """What both kinds of batches take."""
        data, world = self.recipe.data, self.world
        return {
            "batch_size": data.batch_size,
            "seed": self.recipe.seed,
            "rank": world.rank,
            "world": world.size,
            "workers": data.workers,
            "captions": CaptionSampler(data.captions),
            "crop": data.crop,
            "augment": self.augment if data.augment_on == "workers" else None,
            "start_step": start_step,
            "trim": self.model.trimmable,
            "pin_memory": world.device.type == "cuda",
            "max_bad": data.max_bad,
            "known_bad": known_bad,
        }

    def epochs(self, step: int) -> dict[str, dict[str, float]]:
        """How often each source was read in so many steps, where there are several."""
        if self._plan is None or len(self.datasets) < 2:
            return {}
        read = zip(self.datasets, self._plan.epochs(step), strict=True)
        return {"epochs": {dataset.name: round(epochs, 4) for dataset, epochs in read}}

    def describe(self) -> dict[str, Any]:
        """The sources with their shards, as `data.json` has them."""
        exact = self._exact(0)
        if exact is None:
            return {"format": 1, "order": self.digest, "stream": shown(self.recipe.data.train), "sources": []}
        sources = [
            {
                "name": dataset.name,
                "share": str(share),
                "lanes": source.order.lanes,
                "window": source.order.window,
                "samples": len(dataset),
                "shards": dataset.manifest(),
            }
            for dataset, source, share in zip(
                self.datasets, exact.plan.sources, exact.plan.mixture.shares, strict=True
            )
        ]
        return {"format": 1, "order": self.digest, "sources": sources}

    def write_description(self, run: Path, *, first: bool) -> None:
        """Write `data.json`, once in a run's life: before its `first` step, or where it is missing."""
        if first or not (run / DESCRIPTION).exists():
            atomic_write(run / DESCRIPTION, json.dumps(self.describe(), indent=1))

    def check(self, digest: str, run: Path) -> None:
        """Refuse to go on with other data than the run started with.

        Raises:
            ArtifactError: Says what changed.
        """
        try:
            before = json.loads((run / DESCRIPTION).read_text(encoding="utf-8"))["sources"]
        except (OSError, ValueError, KeyError, TypeError):
            before = []
        changes = list(_changes(before, self.describe()["sources"])) if before else []
        if digest == self.digest and not changes:
            return
        more = [f"and {len(changes) - _NAMED} more"] if len(changes) > _NAMED else []
        words = "; ".join(changes[:_NAMED] + more)
        raise ArtifactError(
            f"{run}: the data is not what the run started with: {words or 'the order is another'}",
            hint="put the shards back, or start a new run",
        )

    def left_out(self, bad: Sequence[BadSample]) -> dict[str, int]:
        """Samples that could not be trained on, by reason: those that the index leaves out, and `bad`."""
        left_out = {(str(fault.shard), str(fault.sample), fault.reason) for fault in self._faults()}
        return group_faults([reason for *_, reason in left_out] + [item.reason for item in bad])

    def _faults(self) -> Iterator[Any]:
        for dataset in self.datasets:
            yield from dataset.faults


def _bytes_at_once(data: ShardDataset, order: Order, machines: int) -> float:
    """The size of the shards that the windows of one machine's lanes reach into, at most."""
    shards = len(data.paths)
    span = min(order.window, order.samples / order.lanes)  # samples of a lane that are shuffled together
    of_a_lane = math.ceil(span * shards / order.samples) + 1
    return min(1, of_a_lane * math.ceil(order.lanes / machines) / shards) * data.total_bytes


def _changes(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What differs between two descriptions, for people."""
    if len(before) != len(now):
        yield f"{len(before)} sources then, {len(now)} now"
        return
    for old, new in _pairs(_with_shares(before), _with_shares(now)):
        changes = list(_changed_shards(old["shards"], new["shards"]))
        if not changes:
            names = ("share", "lanes", "window")
            changes = [f"{name} was {old[name]}, is {new[name]}" for name in names if old[name] != new[name]]
        yield from (f"{new['name']}: {change}" for change in changes)


def _with_shares(sources: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources with their shares of all places; described are those of what the ones before left."""
    left, found = Fraction(1), []
    for source in sources:
        share = left * Fraction(source["share"])
        left -= share
        found.append({**source, "share": str(share)})
    return found


def _pairs(
    before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each source then with the one that it is now: by its shards, else by its name, the rest by place.

    Sources stand by their fingerprints, so that one that changes may stand elsewhere, and others with it.
    """

    def shards(source: dict[str, Any]) -> list[str]:
        return sorted(shard["digest"] for shard in source["shards"])

    old, new = list(before), list(now)
    for known_by in (
        lambda source: (source["name"], shards(source)),
        shards,
        lambda source: source["name"],
        lambda source: None,
    ):
        for one in list(old):
            other = next((other for other in new if known_by(other) == known_by(one)), None)
            if other is not None:
                yield one, other
                old.remove(one)
                new.remove(other)


def _changed_shards(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> Iterator[str]:
    then, here = {shard["name"]: shard for shard in before}, {shard["name"]: shard for shard in now}
    yield from (f"{name} is gone" for name in then if name not in here)
    yield from (f"{name} is new" for name in here if name not in then)
    for name in sorted(then.keys() & here.keys()):
        if then[name]["samples"] != here[name]["samples"]:
            yield f"{name}: {then[name]['samples']} samples then, {here[name]['samples']} now"
        elif then[name]["digest"] != here[name]["digest"]:
            yield f"{name} holds other samples"
        elif len({then[name].get("contents"), here[name].get("contents")} - {None}) > 1:
            yield f"{name}: contents changed"
    if then.keys() == here.keys() and list(then) != list(here):
        yield "the shards are in another order"
