"""Which emoji are held out: combinations whose parts are all known from training.

"woman firefighter: medium skin tone" is three parts. A model that has seen each of them, but never all
three together, must compose to find the picture; that is what the held-out set measures.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable

HELDOUT = 500
LEAST = 2
RULE = (
    "Names of the form 'base: modifier, modifier', flags and keycaps aside, are combinations. Their parts "
    "are the modifiers, and the base or, where the base begins with man, woman, men, women, person or people "
    "and has more words, that word and the rest. In the order of the SHA-256 of the name, a combination is "
    f"held out if each of its parts, and its base, stays in at least {LEAST} names that are not held out, "
    f"until {HELDOUT} are."
)
_PEOPLE = ("man", "woman", "men", "women", "person", "people")
_NOT_COMBINATIONS = ("flag", "keycap")


def parts_of(name: str) -> list[str] | None:
    """The parts of a combination's name, or None where the name is none.

    `"woman firefighter: medium skin tone"` gives `["woman", "firefighter", "medium skin tone"]`.
    """
    base, colon, modifiers = name.partition(": ")
    if not colon or base in _NOT_COMBINATIONS:
        return None
    first, space, rest = base.partition(" ")
    bases = [first, rest] if space and first in _PEOPLE else [base]
    return bases + modifiers.split(", ")


def split_names(names: Iterable[str]) -> set[str]:
    """The held-out names among all names (see `RULE`)."""
    combinations = {name: parts for name in names if (parts := parts_of(name))}

    def counted(name: str) -> set[str]:
        return {*combinations[name], name.partition(": ")[0]}

    left = Counter(part for name in combinations for part in counted(name))
    heldout: set[str] = set()
    for name in sorted(combinations, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(heldout) == HELDOUT:
            break
        if all(left[part] > LEAST for part in counted(name)):
            heldout.add(name)
            left.subtract(counted(name))
    return heldout
