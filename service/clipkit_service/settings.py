"""The service's settings: environment variables `CLIPKIT_…`, overridden by what `clipkit serve` is given.

Every limit that protects the process is here, with the default that a laptop or a small server wants. A
request beyond one gets 413, 422 or 429 with the limit in the body.
"""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from clipkit.config import describe
from clipkit.errors import ConfigError

Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """What to serve, where, and within which limits.

    Raises:
        pydantic.ValidationError: From the constructor; `load_settings` turns it into a `ConfigError`.
    """

    model_config = SettingsConfigDict(
        env_prefix="CLIPKIT_", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    model: str = Field(description="Model folder, or an open_clip: or hf: name.")
    index: Path | None = Field(None, description="Index folder; without one only classify and embed work.")
    device: str | None = Field(None, description="Where the model runs; by default a GPU if there is one.")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)

    api_key: SecretStr | None = Field(None, description="When set, /v1 and /metrics need it.")
    allowed_hosts: Names = Field((), description="Host names answered to; empty: loopback names on loopback.")
    cors_origins: Names = Field((), description="Web origins that may read answers; empty: none.")
    docs: bool = Field(True, description="Serve /docs and /openapi.json.")
    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    max_body_bytes: int = Field(20_000_000, gt=0)
    max_image_bytes: int = Field(10_000_000, gt=0)
    max_image_pixels: int = Field(16_000_000, gt=0)
    max_images: int = Field(32, gt=0, description="Pictures in one request.")
    max_texts: int = Field(256, gt=0, description="Texts in one request.")
    max_text_chars: int = Field(4096, gt=0, description="Characters in one text.")
    max_labels: int = Field(1000, gt=0, le=1000)
    max_label_chars: int = Field(256, gt=0)
    max_templates: int = Field(100, gt=0, le=100)
    max_prompts: int = Field(8000, gt=0, description="Labels times templates.")
    max_k: int = Field(1000, gt=0, le=1000)

    queue_items: int = Field(256, gt=0, description="Items admitted at a time to each queue; beyond: 429.")
    max_batch: int = Field(16, gt=0)
    text_cache_items: int = Field(10_000, ge=0, description="Text embeddings kept.")
    decode_threads: int = Field(min(4, os.cpu_count() or 1), gt=0)
    deadline_s: float = Field(30.0, gt=0, description="Seconds a request under /v1 may take; beyond: 504.")
    ready_timeout_s: float = Field(5.0, gt=0, description="Seconds /readyz waits for a forward pass.")

    @field_validator("allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Names may be given as one string with commas, as environment variables are."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str]:
        """The Host names answered to; empty means any.

        On loopback only loopback names are, so that a web page elsewhere cannot read a private index by
        pointing its own name at 127.0.0.1 (DNS rebinding).
        """
        if self.allowed_hosts:
            return frozenset() if "*" in self.allowed_hosts else frozenset(map(str.lower, self.allowed_hosts))
        if self.on_loopback:
            return frozenset({"localhost", "127.0.0.1", "::1", self.host.lower()})
        return frozenset()


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by the arguments that are not None. Raises: ConfigError."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "missing" and first["loc"] == ("model",):
            raise ConfigError("no model was named", hint="pass --model or set CLIPKIT_MODEL") from error
        raise ConfigError(f"settings: {describe(error)}", hint="see clipkit serve --help") from error
