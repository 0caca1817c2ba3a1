"""Requests that work when they are pasted: the examples of the OpenAPI document.

They hold for any model and any index; the picture is a real one, 24 pixels wide: a red disc on white.
"""

from typing import Any

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABgAAAAYAQMAAADaua+7AAAABlBMVEX////cHigwpYgPAAAAPk"
    "lEQVR42mXMoQ2AMABFwesHUdkRGIXJmK2jMEJlBSFYCC85+3h3WEoviT2rLVUL0tTgZ5hBppHLmVvn+BwfVIsJ4LKcSMMAAA"
    "AASUVORK5CYII="
)


def _named(**examples: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: {"summary": summary, "value": value} for name, (summary, value) in examples.items()}


SEARCH = _named(
    text=("Pictures for words", {"query": {"text": "a red balloon"}, "k": 5}),
    image=("Pictures like a picture", {"query": {"image": PICTURE}, "k": 5}),
    id=("Pictures like one of the index", {"query": {"id": 0}, "k": 5}),
    index=(
        "Everything that can be said",
        {
            "index": "default",
            "query": {"text": "一个红色的气球"},
            "k": 3,
            "min_similarity": -1.0,
            "include": ["metadata", "vector"],
        },
    ),
)
CLASSIFY = _named(
    one=("One picture", {"image": PICTURE, "labels": ["a red circle", "a cat", "a dog"]}),
    several=(
        "Several pictures, several templates",
        {
            "images": [PICTURE, PICTURE],
            "labels": ["red", "blue"],
            "templates": ["a photo of something {}", "a {} drawing"],
            "top_k": 1,
        },
    ),
)
EMBEDDINGS = _named(
    text=("One text", {"model": "default", "input": "a red balloon"}),
    mixed=(
        "Texts and pictures in one space",
        {"input": [{"text": "a red circle"}, {"image": PICTURE}], "encoding_format": "base64"},
    ),
)
ZERO_SHOT = _named(
    picture=(
        "As Hugging Face's clients send it",
        {"inputs": PICTURE, "parameters": {"candidate_labels": ["a red circle", "a cat"]}},
    )
)
RANK = _named(
    captions=(
        "Captions for a picture",
        {"query": {"image": PICTURE}, "candidates": ["a red circle", "a green square"], "top_n": 2},
    ),
    pictures=(
        "Pictures for words",
        {"query": {"text": "a red circle"}, "candidates": [{"image": PICTURE}, {"text": "a red disc"}]},
    ),
)
