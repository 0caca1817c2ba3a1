"""Keep some samples of shards: by a condition, by duplicates, by what a model says; list all that is dropped.

The tests run in a fixed order, each on what the one before it left: the condition, exact duplicates, the
score of picture and caption, near duplicates. Which samples are kept is decided first and noted, then they
are copied byte for byte (`clipkit_data.tools.reshard`), so that an interrupted run can be continued.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from clipkit.errors import ConfigError, DataError, InputError
from clipkit.files import atomic_write
from clipkit_data.dataset import ShardDataset
from clipkit_data.records import RecordError, group_faults
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.columns import Digest, columns_of, digest
from clipkit_data.tools.job import each_block, jobs_or_cores, shards_job
from clipkit_data.tools.reshard import copy_samples
from clipkit_data.tools.where import Where

if TYPE_CHECKING:
    from clipkit.models import DualEncoder

DROPPED = "dropped.jsonl"


class Bar(Protocol):
    """A progress bar, such as `clipkit.cli.output.Task`."""

    def advance(self, amount: float = 1) -> None:
        """Move on."""
        ...


Bars = Callable[[str, float | None], AbstractContextManager[Bar]]
"""Makes a bar from a description and its length, as `clipkit.cli.output.progress` does."""


@dataclass(frozen=True)
class Criteria:
    """What a sample must pass to be kept; at least one test.

    Args:
        where: A condition in SQLite's language; see `clipkit_data.tools.where`.
        duplicates: Drop pictures, clips, graphs and texts whose bytes are those of an earlier kept one.
        min_score: Least cosine of picture and caption by the model.
        near_duplicates: Drop pictures whose cosine with an earlier kept one is at least this.
        model: A model's name or folder; the last two tests need it.
    """

    where: str | None = None
    duplicates: bool = False
    min_score: float | None = None
    near_duplicates: float | None = None
    model: str | None = None

    def check(self) -> None:
        """Refuse tests that do not make sense together. Raises: ConfigError."""
        by_model = self.min_score is not None or self.near_duplicates is not None
        if not (by_model or self.where is not None or self.duplicates):
            raise ConfigError(
                "nothing to filter by", hint="give a condition, a score or a kind of duplicates"
            )
        if by_model and self.model is None:
            raise ConfigError("scores and near duplicates need a model", hint="name one with --model")
        if self.model is not None and not by_model:
            raise ConfigError("the model is not used", hint="give --min-score or --near-duplicates as well")
        for name in ("min_score", "near_duplicates"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise ConfigError(f"{name} is a cosine, between -1 and 1; got {value}")


def filter_shards(
    spec: str | Path,
    out: str | Path | None,
    criteria: Criteria,
    *,
    per_shard: int = 10_000,
    jobs: int | None = None,
    device: str | None = None,
    bars: Bars | None = None,
) -> dict[str, Any]:
    """Copy the samples that pass the tests; the folder appears whole or not at all.

    Args:
        spec: Shards, as `resolve_shards` takes them.
        out: The folder to make; after an interrupted run the same call goes on. None only decides.
        tests: What a sample must pass.
        per_shard: Samples per shard; the last one holds what is left.
        jobs: Most processes; None is one per core.
        device: Where the model runs.
        bars: Makes a progress bar for each stage.

    Returns:
        `{"samples", "kept", "dropped": {reason: count}, "shards", "faults": {reason: count}, "out"}`; the
        last three only with `out`. `OUT/dropped.jsonl` lists each dropped sample.

    Raises:
        ConfigError, InputError: Tests that do not make sense, a wrong condition.
        NotFoundError, ArtifactError: No such shards or model; `out` holds something else.
        DataError: No sample is left.
    """
    criteria.check()
    if per_shard < 1:
        raise ConfigError(f"samples per shard must be at least 1, got {per_shard}")
    processes = jobs_or_cores(jobs)
    where = None if criteria.where is None else Where(criteria.where)
    dataset = ShardDataset(resolve_shards(spec), name=str(spec))
    if criteria.min_score is not None and not dataset.has_captions:
        raise InputError(f"{spec}: the samples have no captions to be scored")
    model = _load(criteria, device)
    choice = _Choice(dataset, criteria, where, model, processes, bars or _silent)
    if out is None:
        with TemporaryDirectory() as folder:
            choice.decide(Path(folder))
        return choice.summary()
    settings = {"command": "filter", "source": dataset.fingerprint(), "per_shard": per_shard}
    settings |= asdict(criteria) | ({"model": model.fingerprint} if model else {})
    with shards_job(out, settings) as job:
        choice.decide_once(job.notes)
        if not len(choice.kept_N):
            job.discard()
            words = ", ".join(f"{reason} ×{count}" for reason, count in choice.summary()["dropped"].items())
            raise DataError(f"no sample of {spec} is left: {words}")
        with choice.bars("writing", len(choice.kept_N)) as bar:
            result = copy_samples(
                job, dataset, choice.kept_N, per_shard=per_shard, jobs=processes, progress=bar.advance
            )
        atomic_write(job.folder / DROPPED, choice.lines())
    return {**choice.summary(), "shards": result["shards"], "faults": result["faults"], "out": str(out)}


def _load(criteria: Criteria, device: str | None) -> "DualEncoder | None":
    from clipkit.models import load_model

    return None if criteria.model is None else load_model(criteria.model, device)


@contextmanager
def _silent(description: str, total: float | None) -> Iterator[Bar]:
    class Nothing:
        def advance(self, amount: float = 1) -> None:
            pass

    yield Nothing()


class _Choice:
    """Which samples are kept, and why the others are not."""

    def __init__(
        self,
        dataset: ShardDataset,
        criteria: Criteria,
        where: Where | None,
        model: "DualEncoder | None",
        jobs: int,
        bars: Bars,
    ) -> None:
        self.dataset, self.criteria, self.where = dataset, criteria, where
        self.model, self.jobs, self.bars = model, jobs, bars
        self.kept_N = np.arange(len(dataset))
        self.names = dataset.shard_names
        self.dropped: list[dict[str, Any]] = []

    def decide_once(self, notes: Path) -> None:
        """Decide, or take up what an earlier attempt decided."""
        kept, dropped = notes / "kept.bin", notes / DROPPED
        if kept.is_file():
            self.kept_N = np.frombuffer(kept.read_bytes(), dtype="<i8")
            self.dropped = [json.loads(line) for line in dropped.read_text().splitlines()]
            return
        self.decide(notes)
        atomic_write(dropped, self.lines())
        atomic_write(kept, self.kept_N.astype("<i8").tobytes())

    def decide(self, notes: Path) -> None:
        """Run the tests in their order; what a model says is kept in `notes`."""
        if self.where or self.criteria.duplicates:
            self._look()
        if self.model is not None and len(self.kept_N):
            self._ask_model(notes)
        self.dropped.sort(key=lambda line: line["position"])

    def summary(self) -> dict[str, Any]:
        """How many are kept, and how many dropped for which reason."""
        dropped = group_faults([line["reason"] for line in self.dropped])
        return {"samples": len(self.dataset), "kept": len(self.kept_N), "dropped": dropped}

    def lines(self) -> str:
        """What is dropped, one JSON object per line."""
        return "".join(json.dumps(line) + "\n" for line in self.dropped)

    def _drop(self, position: int, reason: str, **detail: Any) -> None:
        self.dropped.append({**self._name(position), "reason": reason, **detail})

    def _name(self, position: int) -> dict[str, Any]:
        """A sample for people: keys alone are not unique."""
        shard = self.names[self.dataset.locate(position)[0]]
        return {"position": position, "shard": shard, "key": self.dataset.key(position)}

    def _look(self) -> None:
        """The condition and exact duplicates: all samples are read once."""
        first: dict[Digest, int] = {}
        kept: list[int] = []
        fields: set[str] = set()
        with self.bars("reading", len(self.dataset)) as bar:
            for verdicts, found in each_block(_Look(self.dataset, self.where), len(self.dataset), self.jobs):
                fields |= found
                for position, reason, picture in verdicts:
                    if reason:
                        self._drop(position, reason)
                    elif self.criteria.duplicates and first.setdefault(picture, position) != position:
                        self._drop(position, "duplicate", of=self._name(first[picture]))
                    else:
                        kept.append(position)
                bar.advance(len(verdicts))
        if self.where:
            self.where.check_fields(fields)
        self.kept_N = np.array(kept, dtype=np.int64)

    def _ask_model(self, notes: Path) -> None:
        """Scores and near duplicates among what is left."""
        from clipkit_data.tools.similarity import Subset, embed_subset, near_duplicates

        assert self.model is not None
        subset = Subset(self.dataset, self.kept_N)
        with self.bars("embedding", len(subset)) as bar:
            found = embed_subset(self.model, subset, notes / "embeddings", progress=bar.advance)
        for fault in found.faults:
            self._drop(fault["position"], fault["reason"])
        rows = np.arange(len(found.positions_N))
        if self.criteria.min_score is not None:
            enough_N = found.score_N >= self.criteria.min_score  # NaN, no caption, is not enough
            for row in rows[~enough_N]:
                score = float(found.score_N[row])
                detail = {} if np.isnan(score) else {"score": round(score, 4)}
                reason = "score" if detail else "empty caption"
                self._drop(int(found.positions_N[row]), reason, **detail)
            rows = rows[enough_N]
        if self.criteria.near_duplicates is not None:
            with self.bars("comparing", len(rows)) as bar:
                of_N, cosine_N = near_duplicates(
                    found.images_ND[rows], self.criteria.near_duplicates, progress=bar.advance
                )
            for place in np.flatnonzero(of_N >= 0):
                like = self._name(int(found.positions_N[rows[of_N[place]]]))
                position = int(found.positions_N[rows[place]])
                self._drop(position, "near duplicate", of=like, cosine=round(float(cosine_N[place]), 4))
            rows = rows[of_N < 0]
        self.kept_N = found.positions_N[rows]


@dataclass(frozen=True)
class _Look:
    """The condition and the digests of a range of samples: what a process runs."""

    dataset: ShardDataset
    where: Where | None

    def __call__(self, span: tuple[int, int]) -> tuple[list[tuple[int, str, Digest]], set[str]]:
        """Position, reason to drop it ("" for none) and digest of each sample; the fields of the `.json`."""
        verdicts: dict[int, tuple[str, Digest]] = {}
        rows = {}
        for position in range(*span):
            try:
                record = self.dataset[position]
                rows[position] = columns_of(record), record.meta
            except RecordError as error:
                verdicts[position] = error.reason, b""
        fields = {name for _, meta in rows.values() for name in meta}
        held = self.where.holds(list(rows.values())) if self.where else [True] * len(rows)
        for (position, (columns, _)), holds in zip(rows.items(), held, strict=True):
            content = columns.picture or digest(columns.caption.encode())
            verdicts[position] = "" if holds else "where", content
        return [(position, *verdicts[position]) for position in range(*span)], fields
