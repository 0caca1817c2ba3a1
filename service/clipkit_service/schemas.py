"""What requests look like.

Native requests refuse unknown fields, so that a typo is seen; the routes that speak another system's dialect
(`Compat`) ignore them, as that system does. Limits that are settings are checked in the routes; limits that
belong to the types are here.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_ID = 2**63 - 1


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer and no answer can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair") from error
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_encodable)]
Picture = Annotated[
    str, Field(min_length=1, description="The bytes of a picture as a data URI or base64. No addresses.")
]
ItemId = Annotated[int, Field(ge=0, le=MAX_ID)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Native(BaseModel):
    """A request of our own: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Compat(BaseModel):
    """A request in another system's dialect: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


def _one_of(value: BaseModel, *names: str) -> None:
    given = [name for name in names if getattr(value, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(names)}")


# Search


class Query(Native):
    """What to look for: exactly one of the four."""

    text: Text | None = None
    image: Picture | None = None
    vector: list[Finite] | None = Field(default=None, min_length=1, max_length=65536)
    id: ItemId | None = Field(
        default=None, description="An item of the index; it is left out of its own results."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        _one_of(self, "text", "image", "vector", "id")
        return self


Include = Literal["metadata", "vector"]


class SearchRequest(Native):
    index: str | None = Field(
        default=None, description='The index; "default" or nothing is the one there is.'
    )
    query: Query
    k: int = Field(default=20, ge=1, description="How many results.")
    min_similarity: Finite | None = Field(default=None, description="Leave out what is less similar.")
    include: list[Include] = Field(default=["metadata"], max_length=2)


# Classify

Labels = list[Text]


class ClassifyRequest(Native):
    model: str | None = None
    image: Picture | None = None
    images: list[Picture] | None = Field(default=None, min_length=1)
    labels: Labels = Field(min_length=1)
    templates: list[Text] | None = Field(
        default=None, min_length=1, description="Each holds one {} for the label."
    )
    multi_label: bool = False
    top_k: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        _one_of(self, "image", "images")
        return self


def _picture_of(value: Any) -> Any:
    return value["image"] if isinstance(value, dict) and set(value) == {"image"} else value


class PictureObject(Compat):
    image: Picture


class ZeroShotParameters(Compat):
    candidate_labels: Labels = Field(min_length=1)
    hypothesis_template: Text = "This is a photo of {}."
    multi_label: bool = False


class ZeroShotRequest(Compat):
    inputs: Annotated[Picture, BeforeValidator(_picture_of, json_schema_input_type=Picture | PictureObject)]
    parameters: ZeroShotParameters


# Embeddings


class Part(Native):
    """A text or a picture."""

    text: Text | None = None
    image: Picture | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        _one_of(self, "text", "image")
        return self


def _parts(value: Any) -> Any:
    """The dialects' many ways to give inputs, as a list of `{text}` or `{image}`."""
    items = value if isinstance(value, list) else [value]
    return [{"text": item} if isinstance(item, str) else item for item in items]


Loose = str | Part
Parts = Annotated[
    list[Part], BeforeValidator(_parts, json_schema_input_type=Loose | list[Loose]), Field(min_length=1)
]


class EmbeddingsRequest(Compat):
    input: Parts
    model: str | None = None
    modality: Literal["text", "image"] | None = Field(
        None, description='With "image", plain strings are pictures.'
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, description="Must be the model's own.")
    normalized: Literal[True] = True
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _strings_are_pictures(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("modality") == "image":
            value = data.get("input")
            items = value if isinstance(value, list) else [value]
            return {**data, "input": [{"image": i} if isinstance(i, str) else i for i in items]}
        return data


# Rank


class RankRequest(Native):
    model: str | None = None
    query: Part
    candidates: Parts
    top_n: int | None = Field(default=None, ge=1)
