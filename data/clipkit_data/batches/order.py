"""The order of training: which sample stands at which place, computed for any place at once.

Nothing is stored and nothing is drawn one after another: the place of a sample is a pure function of (seed,
epoch, sizes of the shards, lanes, window). Ranks and workers only slice what is computed here, so their
number changes nothing, and the whole position of a run is one integer.

Lanes. In each epoch the shards are permuted and their samples laid out as one line of N. Lane l reads this
line, again and again, from place ⌊l·N/L⌋ on; where it crosses a boundary ⌊r·N/L⌋ it enters the next epoch,
with the next permutation. So an epoch's line is read by L lanes, a range each, every sample once, and a
reader of a few lanes needs a few shards at a time. Place p of the source belongs to lane p mod L.

Shuffling. A lane's range is cut into blocks of W places (the window), each of which is permuted. With one
lane and a window of N or more an epoch is a uniform permutation of all samples.

Mixing. Place p of a run belongs to one of several sources; how many of the first p places are a source's is
computed exactly from rational weights, and is never a whole sample away from its share for two sources (for
S sources, never S).

Shapes: n places asked for, S shards, N samples, L lanes, W window.

References: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from clipkit.errors import ConfigError

VERSION = 1
_SHARDS, _BLOCK = 1, 2  # what a permutation is of: part of its key
_KEPT_EPOCHS = 3  # lanes of one batch are in two epochs at most
_KEPT_PLACES = 1 << 22  # of permuted blocks, 32 MB; one block may be larger


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of 0 … size − 1, int64 (size,): a function of the key's numbers alone."""
    seeds = np.random.SeedSequence(key).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=seeds)).permutation(size)


@dataclass(frozen=True, slots=True)
class Places:
    """Where samples are: epoch, shard and place in the shard, int64 (n,) each; `lane` (n,) reads them."""

    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray
    lane: np.ndarray


class Order:
    """The endless order of one source's samples.

    Args:
        sizes: Sound samples in each shard, (S,).
        seed: At least 0.
        lanes: L, at least 1.
        window: W, samples of a lane that are shuffled together.

    Raises:
        ConfigError: No samples, or a number out of its range.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, *, seed: int, lanes: int, window: int) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        self.starts = np.cumsum(self.sizes) - self.sizes
        if self.samples < 1 or seed < 0 or lanes < 1 or window < 1:
            raise ConfigError(
                f"an order needs samples ({self.samples}), a seed of at least 0 ({seed}), lanes ({lanes}) "
                f"and a window ({window}) of at least 1"
            )
        self.seed, self.lanes, self.window = seed, lanes, window
        self._lines: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._room = 0

    def at(self, place_n: np.ndarray) -> Places:
        """The samples at places 0, 1, 2, … of the source, given in any order, int64 (n,)."""
        lane, turn = place_n % self.lanes, place_n // self.lanes
        t = lane * self.samples // self.lanes + turn  # a place on the lane's endless line
        boundary = ((t + 1) * self.lanes - 1) // self.samples  # the last r with ⌊r·N/L⌋ ≤ t
        epoch = boundary - lane
        start = boundary * self.samples // self.lanes
        length = (boundary + 1) * self.samples // self.lanes - start
        within = t - start
        shuffled = start % self.samples + self._shuffled(epoch, boundary % self.lanes, within, length)
        shard, index = np.empty_like(t), np.empty_like(t)
        for number in np.unique(epoch):
            here = epoch == number
            order, ends = self._line(int(number))
            found = np.searchsorted(ends, shuffled[here], side="right")
            shard[here] = order[found]
            index[here] = shuffled[here] - (ends[found] - self.sizes[order[found]])
        return Places(epoch, shard, index, lane)

    def _shuffled(
        self, epoch: np.ndarray, part: np.ndarray, within: np.ndarray, length: np.ndarray
    ) -> np.ndarray:
        """Places inside ranges after the shuffling inside their blocks, (n,)."""
        block, place = within // self.window, within % self.window
        result = np.empty_like(within)
        keys = np.stack([epoch, part, block, np.minimum(self.window, length - block * self.window)], axis=1)
        unique, inverse = np.unique(keys, axis=0, return_inverse=True)
        for number, (e, r, b, size) in enumerate(unique.tolist()):
            here = inverse.reshape(-1) == number
            result[here] = b * self.window + self._block(e, r, b, size)[place[here]]
        return result

    def _block(self, epoch: int, part: int, block: int, size: int) -> np.ndarray:
        key = epoch, part, block
        if key not in self._blocks:
            self._room += size
            self._blocks[key] = permutation(size, self.seed, _BLOCK, *key)
            while self._room > _KEPT_PLACES and len(self._blocks) > 1:
                self._room -= len(self._blocks.popitem(last=False)[1])
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch (S,), and where each ends on the line (S,)."""
        if epoch not in self._lines:
            order = permutation(len(self.sizes), self.seed, _SHARDS, epoch)
            self._lines[epoch] = order, np.cumsum(self.sizes[order])
            if len(self._lines) > _KEPT_EPOCHS:
                self._lines.popitem(last=False)
        return self._lines[epoch]


class Mixture:
    """Which source each place of a run belongs to.

    Of the first k places, ⌊k·w₁⌋ are the first source's; of the others the second has its share of what is
    left, and so on.

    Args:
        weights: Of each source, above 0; they need not sum to 1. Decimals are taken as they are written.

    Raises:
        ConfigError: No source, or a weight that is not above 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        parts = [Fraction(str(weight)) for weight in weights if math.isfinite(weight) and weight > 0]
        if not parts or len(parts) != len(weights):
            raise ConfigError(f"the weights of sources must be above 0, got {list(weights)}")
        left = [sum(parts[number:], Fraction(0)) for number in range(len(parts))]
        self.shares = [part / rest for part, rest in zip(parts, left, strict=True)]

    def counts(self, places: int) -> list[int]:
        """How many of the first `places` places are each source's."""
        found = []
        for share in self.shares:
            found.append(places * share.numerator // share.denominator)
            places -= found[-1]
        return found


@dataclass(frozen=True)
class Source:
    """One source of a run, for `Plan`: its order and its weight among the others."""

    order: Order
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class BatchPlaces:
    """The samples of one global batch or a part of it: `source` (n,) beside what `Places` has."""

    source: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray

    def __getitem__(self, part: slice) -> "BatchPlaces":
        return BatchPlaces(self.source[part], self.epoch[part], self.shard[part], self.index[part])


class Plan:
    """Global batches: batch b takes the places b·B … (b + 1)·B − 1 of the mixture of the sources.

    The rows of a batch stand by source and lane, so that a contiguous part of it reads few shards.

    Args:
        sources: In their order.
        batch_size: B, over all processes.
    """

    def __init__(self, sources: Sequence[Source], batch_size: int) -> None:
        self.sources, self.batch_size = list(sources), batch_size
        self.mixture = Mixture([source.weight for source in sources])

    def batch(self, step: int) -> BatchPlaces:
        """The samples of a global batch."""
        before = self.mixture.counts(step * self.batch_size)
        after = self.mixture.counts((step + 1) * self.batch_size)
        parts = []
        for number, source in enumerate(self.sources):
            places = source.order.at(np.arange(before[number], after[number], dtype=np.int64))
            rows = np.argsort(places.lane, kind="stable")
            mine = np.full(len(rows), number, dtype=np.int64)
            parts.append((mine, places.epoch[rows], places.shard[rows], places.index[rows]))
        return BatchPlaces(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def epochs(self, step: int) -> list[float]:
        """How often each source has been read when `step` batches are done."""
        counts = self.mixture.counts(step * self.batch_size)
        return [count / source.order.samples for count, source in zip(counts, self.sources, strict=True)]
