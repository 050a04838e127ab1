"""The one place where the environment is read."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, IPvAnyNetwork, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.model_files import DEFAULT_KV_TOKENS

SECRETS_DIRECTORY = Path("/run/secrets")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104  # nothing is bound here: what is bound to these has no name of its own


def _names(value: Any) -> Any:
    """Take names with commas between them, as variables hold them best, or JSON."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if '"' in value else [name.strip() for name in value.split(",")]


GpuName = Annotated[str, Field(pattern=r"^(\d+|GPU-[0-9a-f-]+)$")]
# No scheme and no port: such a name would be compared with hosts that have none, and match nothing.
HostName = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])$")]


class RemoteSettings(BaseSettings):
    """How other servers are asked for models that these serve: all that an engine child needs to know of settings."""

    model_config = SettingsConfigDict(
        env_prefix="LAMPLIGHTER_", env_ignore_empty=True, frozen=True, extra="ignore", hide_input_in_errors=True
    )

    remote_hosts: Annotated[list[str], NoDecode, BeforeValidator(_names)] = Field(
        ["*"], description="Hosts that remote models may be on, commas between: HOST or HOST:PORT, * for any characters"
    )
    remote_concurrency: int = Field(
        128, ge=1, le=1024, description="Calls that one worker has in flight at one remote server, at most"
    )
    remote_timeout_seconds: float = Field(
        600.0, gt=0, description="A remote call to which nothing came for so long ends"
    )
    remote_patience_seconds: float = Field(
        30.0, gt=0, description="Batch lines wait so long for a remote server that is away; online calls 10 s at most"
    )
    remote_silence_seconds: float = Field(
        30.0, gt=0, description="With calls in flight, a remote server that was silent for so long is asked if it lives"
    )


class Settings(RemoteSettings):
    """Settings shared by all services; every field is the variable `LAMPLIGHTER_<NAME>`."""

    # What is refused is often a password, or stands beside one: errors do not repeat it.
    model_config = SettingsConfigDict(
        env_prefix="LAMPLIGHTER_", env_ignore_empty=True, frozen=True, extra="ignore", hide_input_in_errors=True
    )

    database_url: SecretStr = Field(
        min_length=1, description="postgresql://USER:PASSWORD@HOST:PORT/DATABASE of this service's role"
    )
    database_role: str | None = Field(None, description="Role to assume after login (SET ROLE), when logins are shared")
    redis_url: SecretStr = Field(min_length=1, description="redis://[:PASSWORD@]HOST:PORT/0")
    store_url: str = Field(description="fsspec URL or directory of file contents and weights")

    host: str = Field("127.0.0.1", description="Address that the gateway listens on")
    port: int = Field(8000, description="Port that the gateway listens on")
    allowed_hosts: Annotated[list[HostName], NoDecode, BeforeValidator(_names)] = Field(
        list(LOOPBACK),
        description="Names under which the gateway is called, commas between them; *.DOMAIN and * are possible",
    )

    flower_host: str = Field("127.0.0.1", description="Address that Flower listens on")
    flower_port: int = Field(5555, description="Port that Flower listens on")
    flower_user: str = Field("lamplighter", description="Who may look at Flower")
    flower_password: SecretStr | None = Field(None, description="And with what; without it Flower does not start")
    flower_url: str | None = Field(None, description="Where browsers find Flower; the board's tasks are links to there")
    board_url: str | None = Field(
        None, description="Where browsers find the board; Flower's tasks name their job's page"
    )

    max_queued_lines: int = Field(10_000_000, ge=1, description="Unfinished batch lines that the system accepts")
    max_queued_lines_per_tenant: int = Field(2_000_000, ge=1, description="Unfinished batch lines of one tenant")
    max_open_training_jobs_per_tenant: int = Field(100, ge=1, description="Training jobs that a tenant may have open")
    online_limit: int = Field(512, ge=1, description="Online calls in flight on one worker")
    online_limit_per_tenant: int = Field(384, ge=1, description="Online calls in flight of one tenant, at each gateway")
    online_timeout_seconds: float = Field(
        600.0, gt=0, description="An online call that brought nothing for so long ends"
    )
    requests_per_minute: int = Field(
        0, ge=0, description="Requests that a tenant may make at each gateway; 0: no limit"
    )
    tenant_cache_seconds: float = Field(
        1.0, ge=0, description="How long a gateway trusts a key or a model name that it has looked up"
    )

    lease_seconds: float = Field(60.0, gt=0, description="A slice whose lease ran out is given to another worker")
    heartbeat_seconds: float = Field(10.0, gt=0, description="How often a worker says that it lives, and renews leases")
    hang_seconds: float = Field(120.0, gt=0, description="A child that makes no progress for so long is killed")
    drain_seconds: float = Field(30.0, gt=0, description="Time for running slices to flush after SIGTERM")
    dispatch_seconds: float = Field(1.0, gt=0, description="Pause between dispatcher ticks that nothing wakes")
    reap_seconds: float = Field(5.0, gt=0, description="How often ended leases and silent workers are looked for")
    redispatch_seconds: float = Field(60.0, gt=0, description="A dispatched slice that nobody claimed is sent again")
    epoch_seconds: float = Field(2.0, gt=0, description="How often Redis is asked whether it lost its data")
    audit_seconds: float = Field(60.0, gt=0, description="How often the invariants of jobs and slices are checked")
    forecast_seconds: float = Field(5.0, gt=0, description="How often it is foretold when open jobs begin and end")
    webhook_networks: Annotated[list[IPvAnyNetwork], NoDecode, BeforeValidator(_names)] = Field(
        [],
        description="Private networks that webhooks may go to, such as 10.0.0.0/8, commas between them",
    )
    webhook_timeout_seconds: float = Field(15.0, gt=0, le=60, description="Time for one delivery of a webhook")
    traces_url: str | None = Field(
        None, description="Where traces of ended jobs go, by OTLP over HTTP: http://COLLECTOR:4318/v1/traces"
    )
    erasure_grace_seconds: float = Field(
        900.0, ge=0, description="A tenant's data goes so long after its keys: no call of it is under way by then"
    )
    result_retention_days: int = Field(30, ge=1, description="Results, and answers under idempotency keys, are kept")
    metadata_retention_days: int = Field(
        365, ge=1, description="Slices, attempts and events of a job are kept after its end; jobs and usage stay"
    )

    trainer_address: str | None = Field(
        None, description="This host's IP address for trainers of other hosts; without it, jobs stay on one host"
    )
    slots: int = Field(4, ge=1, le=64, description="Slices that one worker runs at once")
    queue_window: int = Field(2, ge=0, description="Slices that wait in Redis beyond a worker's free slots")
    slice_lines: int = Field(256, ge=1, le=4096, description="Largest slice that the planner makes")
    flush_seconds: float = Field(0.5, gt=0, description="Results wait so long to be recorded together")
    flush_lines: int = Field(512, ge=1, description="As many are recorded at once, without waiting")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where there are any, else the CPU")
    workers: str = Field("auto", description="Number of worker processes on this host, or auto: one for each device")
    gpus: Annotated[list[GpuName], NoDecode, BeforeValidator(_names)] = Field(
        [], description="Of this host's GPUs those to use, by nvidia-smi's UUIDs or numbers; by default all"
    )
    cache_bytes: int | None = Field(None, description="Byte budget of the model cache; by default 80 % of the device")
    kv_tokens: int = Field(
        DEFAULT_KV_TOKENS, ge=16, description="Tokens in a model's KV cache, or one full context if that is more"
    )
    torch_threads: int | None = Field(None, description="CPU threads of an engine child; by default cores / workers")
    alive_file: str | None = Field(
        None,
        description="Touched every few seconds by scheduler, preprocessor and launcher: health checks ask for its age",
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")

    @cached_property
    def sqlalchemy_url(self) -> str:
        """The database URL with the driver that we use."""
        url = self.database_url.get_secret_value()
        scheme, _, rest = url.partition("://")
        return f"postgresql+psycopg://{rest}" if scheme in {"postgres", "postgresql"} else url

    @property
    def served_hosts(self) -> list[str]:
        """What the gateway answers to as `Host`: the allowed names, and the one address that it listens on."""
        own = f"[{self.host}]" if ":" in self.host else self.host
        return self.allowed_hosts if self.host in ANY_ADDRESS else [*self.allowed_hosts, own]

    @cached_property
    def store_directory(self) -> Path | None:
        """The store as a local directory, where it is one."""
        return None if "://" in self.store_url else Path(self.store_url)


MIN_PASSWORD_CHARACTERS = 16
WELL_KNOWN = frozenset({"", "changeme", "change-me", "password", "postgres", "redis", "admin", "secret", "lamplighter"})
"""Passwords that everybody tries first."""


class SetupSettings(BaseSettings):
    """What the set-up of a deployment needs, and no service ever sees: passwords of every login, the first key."""

    # What is refused is often a password, or stands beside one: errors do not repeat it.
    model_config = SettingsConfigDict(env_prefix="LAMPLIGHTER_", frozen=True, extra="ignore", hide_input_in_errors=True)

    superuser_url: SecretStr
    database: str = "lamplighter"
    admin_key: SecretStr
    redis_password: SecretStr
    flower_password: SecretStr
    migration_password: SecretStr
    gateway_password: SecretStr
    preprocessor_password: SecretStr
    worker_password: SecretStr
    scheduler_password: SecretStr

    @property
    def passwords(self) -> dict[str, str]:
        """The services' passwords by role."""
        roles = ("migration", "gateway", "preprocessor", "worker", "scheduler")
        return {role: getattr(self, f"{role}_password").get_secret_value() for role in roles}

    @model_validator(mode="after")
    def _nobody_can_guess_them(self) -> Self:
        password = urlsplit(self.superuser_url.get_secret_value()).password or ""
        others = {
            "the superuser": password,
            "Redis": self.redis_password.get_secret_value(),
            "Flower": self.flower_password.get_secret_value(),
            "the admin key": self.admin_key.get_secret_value(),
        }
        for name, secret in (others | self.passwords).items():
            if secret.lower() in WELL_KNOWN or len(secret) < MIN_PASSWORD_CHARACTERS:
                raise ValueError(f"The password of {name} is missing, too short or well known. Run tools/write_env.py.")
        return self


def load_remote_settings() -> RemoteSettings:
    """Read from the environment what an engine child needs of it."""
    return RemoteSettings()


def read_secret(variable: str) -> SecretStr | None:
    """Return the secret that an environment variable holds, or the file that `<variable>_FILE` names; None for none."""
    if value := os.environ.get(variable, "").strip():
        return SecretStr(value)
    if path := os.environ.get(f"{variable}_FILE"):
        try:
            return SecretStr(Path(path).read_text().strip()) if Path(path).stat().st_size else None
        except (OSError, UnicodeDecodeError):
            return None
    return None


def load_settings() -> Settings:
    """Read the environment once; a service's wiring file calls this and hands the object on."""
    return Settings(_secrets_dir=secrets_directory())


def load_setup_settings() -> SetupSettings:
    """Read what the set-up of a deployment needs."""
    return SetupSettings(_secrets_dir=secrets_directory())


def secrets_directory() -> Path | None:
    """Return where containers have secrets, a file each by the lower-case name of its variable; None elsewhere."""
    return SECRETS_DIRECTORY if SECRETS_DIRECTORY.is_dir() else None
