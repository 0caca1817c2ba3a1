"""Random numbers as a function of what they are for, not of when they are drawn.

Each draw is a hash of (seed, purpose, epoch, sample id, view, number of the draw), so a sample is cropped,
coloured and captioned the same way whichever worker or rank handles it, and after a resume. The order of an
epoch is a permutation by numpy's Philox generator with key (seed, epoch).

References: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (the mixing
function of SplitMix64); Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

from enum import IntEnum

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


class Purpose(IntEnum):
    """What a random number is for: draws for different purposes are independent."""

    CAPTION = 1
    AUGMENT = 2
    SPARE = 3
    CROP = 4
    CHECKSUM = 5


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def keyed_integers(
    seed: int, purpose: Purpose, epoch_N: np.ndarray, id_N: np.ndarray, draws: int, *, view: int = 0
) -> np.ndarray:
    """Uniform uint64 numbers (N, draws), row n a function of seed, purpose, epoch_N[n], id_N[n], view alone.

    The first k columns are the same for any number of draws.

    Args:
        seed: The run's seed, at least 0.
        purpose: What the numbers are for.
        epoch_N: Epoch of each sample, integers (N,).
        id_N: Id of each sample, integers (N,).
        draws: How many numbers per sample.
        view: Which view of the sample, at least 0.
    """
    state_N = np.full(len(id_N), seed, dtype=np.uint64)
    # View 0 adds no round, so that a sample with one view keeps the numbers it had before there were views.
    for part in (int(purpose), epoch_N, id_N, view)[: 4 if view else 3]:
        state_N = _mix(state_N + _STEP) ^ np.asarray(part).astype(np.uint64)
    state_N = _mix(state_N + _STEP)
    return _mix(state_N[:, None] + _STEP * np.arange(1, draws + 1, dtype=np.uint64))


def keyed_uniforms(
    seed: int, purpose: Purpose, epoch_N: np.ndarray, id_N: np.ndarray, draws: int, *, view: int = 0
) -> np.ndarray:
    """Uniform float64 numbers in [0, 1), shape (N, draws); arguments as in `keyed_integers`."""
    return (keyed_integers(seed, purpose, epoch_N, id_N, draws, view=view) >> np.uint64(11)) * 2.0**-53


def epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order of one epoch: a permutation of 0 … samples − 1, int64, a function of (seed, epoch)."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(samples)
