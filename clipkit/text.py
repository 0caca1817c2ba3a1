"""Texts to token ids: one small interface over open_clip's and transformers' tokenizers.

A tokenizer belongs to a model: `config()` is stored with it, files it needs are saved beside the weights,
and `identity()` (what it does, not where it came from) enters the model's fingerprint. All give int64 ids
(N, L) of one fixed length L; `trim` cuts a batch to its longest text where the model allows it.

Shapes: N texts, L context length in tokens.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from clipkit.config import Config, validate
from clipkit.errors import ArtifactError, ConfigError, DependencyError
from clipkit.registry import Registry, Spec

Clean = Literal["lower", "whitespace", "canonicalize"]
ContextLength = Annotated[int, Field(ge=3, le=8192)]

TOKENIZER_FOLDER = "tokenizer"
_MAX_CACHED_WORDS = 100_000
_MAX_TOKEN_CHARACTERS = 40
_PROBE = "A photo of 2 café-goers, 红苹果 🍎!"


class Tokenizer(Protocol):
    """What a model needs of its tokenizer."""

    context_length: int
    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 (N, L); longer texts are cut and keep their end token."""
        ...

    def config(self) -> dict[str, Any]:
        """The mapping from which `build_tokenizer` makes an equal one."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the tokenizer does, as plain JSON: equal for equal ids, wherever it was loaded from."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `build_tokenizer(config, folder)` needs, if any."""
        ...


def trim(ids_NL: Tensor, pad_id: int, multiple: int = 8) -> Tensor:
    """Drop the columns that hold only padding.

    Exact for causal text towers that pool at the end token, since later tokens never reach it. One column
    past the longest text is kept: some tokenizers pad with the end token itself.

    Args:
        ids_NL: Token ids, int64 (N, L).
        pad_id: The id that fills short rows.
        multiple: Lengths are rounded up to it, so that few shapes occur.

    Returns:
        A view (N, l) of `ids_NL`, l ≤ L.
    """
    if ids_NL.numel() == 0:
        return ids_NL
    used_L = (ids_NL != pad_id).any(dim=0).nonzero()
    length = int(used_L[-1]) + 2 if len(used_L) else 1
    return ids_NL[:, : -(-length // multiple) * multiple]


class ClipTokenizerConfig(Config):
    """CLIP's own byte-pair encoding, 49,408 tokens; its vocabulary ships with open_clip."""

    context_length: ContextLength = 77
    clean: Clean = "lower"
    reduction_mask: Literal["", "simple", "random", "shuffle", "syntax"] = ""


class ClipTokenizer:
    """CLIP's byte-pair encoding with any context length."""

    def __init__(self, context_length: int = 77, clean: Clean = "lower", reduction_mask: str = "") -> None:
        self.context_length = context_length
        self._clean: Clean = clean
        self._reduction_mask = reduction_mask
        self._simple = _simple_tokenizer(context_length, clean, reduction_mask)
        self.vocab_size: int = self._simple.vocab_size
        self.eos_id: int = self._simple.eot_token_id
        self.pad_id = 0

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 (N, L); longer texts are cut and keep their end token."""
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        if len(self._simple.cache) > _MAX_CACHED_WORDS:  # open_clip remembers every word it has ever seen
            self._simple.cache = {token: token for token in ("<start_of_text>", "<end_of_text>")}
        return self._simple(list(texts))

    def config(self) -> dict[str, Any]:
        """The mapping from which `build_tokenizer` makes an equal one."""
        options = {"context_length": self.context_length, "clean": self._clean}
        masked = {"reduction_mask": self._reduction_mask} if self._reduction_mask else {}
        return {"name": "clip", **options, **masked}

    def identity(self) -> dict[str, Any]:
        """The configuration: the vocabulary is always the same."""
        return self.config()

    def save(self, folder: Path) -> None:
        """Nothing to write: the vocabulary ships with open_clip."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.context_length, self._clean, self._reduction_mask)


@lru_cache(maxsize=8)
def _simple_tokenizer(context_length: int, clean: Clean, reduction_mask: str) -> Any:
    """open_clip's tokenizer; shared, since its vocabulary takes a while to read and some memory."""
    module = _open_clip_tokenizers()
    tokenizer: Any = module.SimpleTokenizer(
        context_length=context_length, clean=clean, reduction_mask=reduction_mask
    )
    limit = context_length * _MAX_TOKEN_CHARACTERS
    tokenizer.clean_fn = partial(_clean_start, module.get_clean_fn(clean), limit)
    return tokenizer


@lru_cache(maxsize=1)
def _open_clip_tokenizers() -> Any:
    """open_clip's module of tokenizers, without the package around it: that imports every model there is."""
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise DependencyError("open_clip is missing", hint="pip install open_clip_torch")
    spec = spec_from_file_location("_open_clip_tokenizer", Path(package.origin).with_name("tokenizer.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _clean_start(clean: Callable[[str], str], limit: int, text: str) -> str:
    """The part of a cleaned text that can reach the model: no token is longer than 32 characters.

    Byte-pair encoding takes time quadratic in a word's length; this bounds it.
    """
    return clean(text)[:limit]


class OpenClipTokenizerConfig(Config):
    """The tokenizer of an open_clip model that takes its vocabulary from a transformers tokenizer."""

    source: str
    context_length: ContextLength = 77
    mode: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class OpenClipTokenizer:
    """open_clip's wrapper around a transformers tokenizer: its cleaning, modes and options."""

    def __init__(self, config: OpenClipTokenizerConfig, folder: Path | None = None) -> None:
        from open_clip.tokenizer import HFTokenizer

        self._config = config
        self.context_length = config.context_length
        source = _tokenizer_source(config.source, folder)
        with _readable_errors(source):
            self._tokenizer = HFTokenizer(
                source, context_length=config.context_length, tokenizer_mode=config.mode, **config.options
            )
        inner: Any = self._tokenizer.tokenizer
        self.vocab_size = len(inner)
        self.eos_id, self.pad_id = _special_ids(inner)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 (N, L)."""
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        return self._tokenizer(list(texts))

    def config(self) -> dict[str, Any]:
        """The mapping from which `build_tokenizer` makes an equal one."""
        return {"name": "open_clip", **self._config.model_dump(mode="json")}

    def identity(self) -> dict[str, Any]:
        """The options, and a digest of the vocabulary and of the ids of a probe text."""
        options = self._config.model_dump(mode="json", exclude={"source"})
        return {"name": "open_clip", **options, "digest": _digest(self, self._tokenizer.tokenizer)}

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files to `folder/tokenizer`."""
        self._tokenizer.save_pretrained(str(folder / TOKENIZER_FOLDER))


class HFTokenizerConfig(Config):
    """Any transformers tokenizer, by name on the Hugging Face hub or from a folder."""

    source: str
    context_length: ContextLength = 77
    lower: bool = False


class HFTokenizer:
    """A transformers tokenizer, padded to one length."""

    def __init__(self, config: HFTokenizerConfig, folder: Path | None = None) -> None:
        from transformers import AutoTokenizer

        self._config = config
        self.context_length = config.context_length
        source = _tokenizer_source(config.source, folder)
        with _readable_errors(source):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._tokenizer.padding_side = "right"
        self.vocab_size = len(self._tokenizer)
        self.eos_id, self.pad_id = _special_ids(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 (N, L)."""
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        lines = [text.lower() for text in texts] if self._config.lower else list(texts)
        return self._tokenizer(
            lines, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        ).input_ids

    def config(self) -> dict[str, Any]:
        """The mapping from which `build_tokenizer` makes an equal one."""
        return {"name": "hf", **self._config.model_dump(mode="json")}

    def identity(self) -> dict[str, Any]:
        """The options, and a digest of the vocabulary and of the ids of a probe text."""
        options = self._config.model_dump(mode="json", exclude={"source"})
        return {"name": "hf", **options, "digest": _digest(self, self._tokenizer)}

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files to `folder/tokenizer`."""
        self._tokenizer.save_pretrained(str(folder / TOKENIZER_FOLDER))


TOKENIZERS = Registry(
    "tokenizer",
    (
        Spec("clip", ClipTokenizerConfig, lambda config, folder=None: ClipTokenizer(**config.model_dump())),
        Spec("open_clip", OpenClipTokenizerConfig, OpenClipTokenizer),
        Spec("hf", HFTokenizerConfig, HFTokenizer),
    ),
    group="clipkit.tokenizers",
)


def build_tokenizer(config: dict[str, Any], folder: Path | None = None) -> Tokenizer:
    """The tokenizer that a configuration names.

    Args:
        config: `{"name": …, options…}`; see the `*TokenizerConfig` classes.
        folder: The model folder it was saved in, whose files are used instead of `source`.

    Raises:
        ConfigError: No name, or a wrong option.
        NotFoundError: An unknown name.
        DependencyError: Its files are neither here nor can they be downloaded.
    """
    options = dict(config)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"tokenizer.name: missing; known: {', '.join(TOKENIZERS.names())}")
    spec = TOKENIZERS.get(name)
    return spec.build(validate(spec.config, options, f"tokenizer {name!r}"), folder)


def _tokenizer_source(source: str, folder: Path | None) -> str:
    """Where a transformers tokenizer is loaded from: the model folder it was saved in, else its source."""
    if folder is None:
        return source
    saved = folder / TOKENIZER_FOLDER
    if not saved.is_dir():
        raise ArtifactError(f"{saved} is missing", hint="save the model again")
    return str(saved)


@contextmanager
def _readable_errors(source: str) -> Iterator[None]:
    """Say in one line why a transformers tokenizer could not be loaded."""
    try:
        yield
    except ImportError as error:
        raise DependencyError(f"the tokenizer of {source!r} needs a package: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DependencyError(
            f"cannot load the tokenizer {source!r}: {_first_line(error)}",
            hint="without a network, give a folder that holds the tokenizer's files",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _special_ids(tokenizer: Any) -> tuple[int, int]:
    """End and padding ids of a transformers tokenizer; BERT's kind ends a text with its separator."""
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    pad = tokenizer.pad_token_id
    if eos is None or pad is None:
        raise ConfigError("the tokenizer has no end token or no padding token")
    return int(eos), int(pad)


def _digest(tokenizer: Tokenizer, inner: Any) -> str:
    """SHA-256 of the vocabulary and of what the tokenizer makes of a probe text."""
    content = [sorted(inner.get_vocab().items()), tokenizer.encode([_PROBE]).tolist()]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
