"""Every setting of the service, read once: a YAML file, then environment overrides, then one frozen object.

Each key is documented where it is defined. `server.port` in the file is `LIPSYNC_SERVER__PORT` in the environment.
A key or value that is not understood stops the start with its path and what is allowed. Nothing else reads the
environment.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, ValidationError
from pydantic.fields import FieldInfo

from .errors import SettingsInvalid
from .web_origin import origin_of

PREFIX = "LIPSYNC_"
RESERVED = {"LIPSYNC_CONFIG", "LIPSYNC_TRITON_HOME"}
"""Variables of the prefix that are no settings: where the file lies, and where the embedded Triton is installed."""

STANDARD = {"OTEL_EXPORTER_OTLP_ENDPOINT": "tracing.endpoint", "OTEL_SERVICE_NAME": "tracing.service_name"}
"""Variables of OpenTelemetry's specification, and the setting that each is unless its own variable is there."""


def _split(value: object) -> object:
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _as_sent(origin: str) -> str:
    """The origin, or *. Raises ValueError for what no browser sends, and so would never match."""
    if origin != "*" and origin != (sent := origin_of(origin)):
        raise ValueError(
            f"leave out user, path and the scheme's own port, and use small letters, as browsers do: {sent}"
        )
    return origin


def _not_empty(words: tuple[str, ...]) -> tuple[str, ...]:
    if not words:
        raise ValueError("there must be one at least")
    return words


class Section(BaseModel):
    """A group of settings: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(Section):
    """The gRPC server."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all, without authentication.")
    port: int = Field(50052, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    max_message_mb: int = Field(160, ge=1, le=1024, description="Largest message in either direction, MiB.")
    workers: int = Field(
        1, ge=1, le=64, description="Processes that serve, all on the same ports; every limit is that of one of them."
    )
    max_frames: int = Field(50, ge=1, le=50, description="Most frames that one Composite call may ask for.")
    max_audio_s: float = Field(600, gt=0, le=3600, description="Longest speech in one Generate call, seconds.")
    threads: int = Field(
        0, ge=0, le=256, description="Threads that blend and encode; 0 means one a core, divided among the workers."
    )
    timeout_s: float = Field(
        60,
        gt=0,
        le=3600,
        description="Where the caller sets no deadline: longest wait for a batch of frames, loading included.",
    )
    max_calls: int = Field(256, ge=1, le=10_000, description="Most calls at once; more are told to come back later.")
    drain_delay_s: float = Field(
        0,
        ge=0,
        le=600,
        description="How long a service that stops, and says so in its health, still takes new calls: what a load "
        "balancer needs to notice.",
    )
    drain_s: float = Field(
        10, ge=0, le=600, description="Time that running calls and speech get to finish when the service stops."
    )


Words = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""A list of words, or one text of them with commas, as the environment and the command line give it."""
Address = Annotated[str, Field(pattern=r"^[^\s/]+:\d+$")]
Origin = Annotated[str, AfterValidator(_as_sent)]


class TritonSettings(Section):
    """The Triton Inference Servers that the compositor asks."""

    endpoints: Annotated[tuple[Address, ...], BeforeValidator(_split), AfterValidator(_not_empty)] = Field(
        ("127.0.0.1:8001",),
        max_length=64,
        description="gRPC addresses, host:port, of one Triton or several; a tenant is served by one of them at a time.",
    )
    key_file: Path | None = Field(
        None,
        description="File with the key that every Triton asks for where it restricts loads and shared memory by one: "
        "the value of the header triton-grpc-protocol-lipsync-key.",
    )
    gpus: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_split)] = Field(
        (), max_length=64, description="GPUs of each Triton that tenants are placed on; none: as config.pbtxt says."
    )
    placement: Literal["least_loaded", "round_robin"] = Field(
        "least_loaded", description="Which of a Triton's GPUs gets the next tenant."
    )
    timeout_s: float = Field(
        10, gt=0, le=600, description="How long after its caller has gone a request's answer is still awaited."
    )
    load_timeout_s: float = Field(120, gt=0, le=3600, description="Longest wait for a model to load.")
    restart_wait_s: float = Field(
        15, ge=0, le=600, description="How long a request waits for a Triton that cannot be reached, before it fails."
    )
    shared_memory: Literal["auto", "off"] = Field(
        "auto",
        description="auto: mouths come back through system shared memory where Triton can map it; off: as tensors.",
    )
    slots: int = Field(
        16,
        ge=1,
        le=256,
        description="Requests to a Triton that are awaited at once; each has its piece of shared memory.",
    )
    slot_frames: int = Field(
        8, ge=1, le=50, description="Most frames in one request to Triton, and the size of a slot."
    )


class ResidencySettings(Section):
    """Which models stay loaded. Budgets are those of one device: a GPU, or the CPU, of one Triton."""

    max_models: int = Field(
        40, ge=2, le=10_000, description="Most tenants' models loaded at once; audio encoders do not count."
    )
    max_mb: int = Field(
        0, ge=0, le=10_000_000, description="Most memory of all models together, MB as measured; 0 for no limit."
    )
    headroom: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Places kept free at most, as long as loads wait for another's end; null: a tenth of all.",
    )
    policy: Literal["lfu", "lru"] = Field(
        "lfu", description="Who leaves first: the least often used of late, or the one whose last use is longest ago."
    )
    half_life_s: float = Field(
        600, gt=0, le=86_400, description="lfu: time after which a use counts half, so that old favourites leave."
    )
    idle_s: float = Field(0, ge=0, le=86_400, description="A model not used for so long is unloaded; 0: never.")
    min_resident_s: float = Field(
        10, ge=0, le=3600, description="A model used or loaded more recently stays; under 3, a silent session's may go."
    )
    pinned: Words = Field((), description="Tenants that are loaded at the start and never unloaded.")
    preload: Words = Field((), description="Tenants that are loaded at the start.")
    concurrent_loads: int = Field(2, ge=1, le=64, description="Loads under way at once in one Triton; more wait.")
    failed_s: float = Field(
        10, ge=0, le=3600, description="How long a failed load is remembered before it is tried again."
    )
    open_mb: int = Field(
        4096, ge=64, le=10_000_000, description="Most bytes of prepared frames that the compositor keeps mapped, MB."
    )
    sweep_s: float = Field(
        2, gt=0, le=60, description="Period of the look at Triton's statistics, by which use is judged."
    )


class HttpSettings(Section):
    """The HTTP server: the page, WebSocket, health and metrics."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all, without authentication.")
    port: int = Field(8086, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    max_message_mb: int = Field(16, ge=1, le=160, description="Largest WebSocket message or upload, MiB.")
    max_connections: int = Field(1024, ge=1, le=100_000, description="Most connections at once; more are refused.")
    allowed_origins: Annotated[tuple[Origin, ...], BeforeValidator(_split)] = Field(
        (),
        description="Whose web pages, beside the service's own, may open WebSockets, post speech and read answers: "
        "origins such as https://shop.example.org, as browsers write them; * for all.",
    )


class LiveSettings(Section):
    """Live sessions."""

    max_sessions: int = Field(128, ge=1, le=10_000, description="Most sessions at once; more are told to come back.")
    max_late: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Share of late pictures, as measured, above which no more sessions begin; 1: they begin all the "
        "same, and all at once.",
    )
    burst: int = Field(
        16,
        ge=1,
        le=10_000,
        description="Sessions that may begin at once after a quiet time; in the long run one a second, or a sixteenth "
        "of all if that is more: what they weigh shows only then.",
    )
    start_timeout_s: float = Field(10, gt=0, le=600, description="How long a connection may wait before it starts.")
    lookahead_ms: int = Field(
        453,
        ge=0,
        le=453,
        description="Speech after a frame's begin that its mouth is made from: less is faster, worse.",
    )
    margin_ms: int = Field(
        80, ge=20, le=1000, description="Time from a frame's request to its showing: what inference may take."
    )
    frames_per_request: int = Field(
        1, ge=1, le=50, description="Frames that a session asks for at once: more costs less CPU, and delay."
    )
    gather_ms: float = Field(
        40,
        ge=0,
        le=40,
        description="Period at which the speech of all sessions becomes frames together; 0: each at once.",
    )
    fade_ms: int = Field(120, ge=0, le=1000, description="How long the mouth takes between rest and speech.")
    silence_dbfs: float = Field(
        -50, ge=-100, le=0, description="Speech below this level (RMS) leaves the mouth at rest."
    )
    buffer_s: float = Field(300, ge=1, le=3600, description="Most speech that may wait to be shown, seconds.")


class AudioSettings(Section):
    """Speech."""

    edge: Literal["silence", "zeros"] = Field(
        "silence", description="What lies around the speech: encoded silence, or zero vectors as in training."
    )


class LoggingSettings(Section):
    """Logs go to stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is written."
    )
    format: Literal["text", "json"] = Field("text", description="json: one object a line, for programs.")


class TracingSettings(Section):
    """Traces of calls. Off unless an endpoint is set."""

    endpoint: Annotated[str, Field(pattern=r"^(https?://[^\s/]+/?)?$")] = Field(
        "", description="OpenTelemetry collector, by OTLP over gRPC: http://127.0.0.1:4317; https for TLS."
    )
    service_name: str = Field("lipsync", min_length=1, description="What traces call this service.")
    sample_ratio: float = Field(
        1, ge=0, le=1, description="Part of the calls that is traced; a caller who traces his own decides for them."
    )


class Settings(Section):
    """The whole configuration of a compositor."""

    model_repository: Path = Field(Path("model_repository"), description="Directory of tenants and encoders.")
    server: ServerSettings = ServerSettings()
    triton: TritonSettings = TritonSettings()
    residency: ResidencySettings = ResidencySettings()
    http: HttpSettings = HttpSettings()
    live: LiveSettings = LiveSettings()
    audio: AudioSettings = AudioSettings()
    logging: LoggingSettings = LoggingSettings()
    tracing: TracingSettings = TracingSettings()

    def with_ports(self, grpc: int, http: int) -> Settings:
        """The same settings, but for the ports."""
        ports = {"server": grpc, "http": http}
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update={"port": port}) for name, port in ports.items()}
        )

    def with_triton(self, endpoint: str) -> Settings:
        """The same settings, but for a Triton at `endpoint`, host:port."""
        return self.model_copy(update={"triton": self.triton.model_copy(update={"endpoints": (endpoint,)})})


def read_settings(
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    options: Mapping[str, tuple[str, str]] | None = None,
) -> Settings:
    """The settings of `path` (default: the file that LIPSYNC_CONFIG names, if any) with the environment's overrides.

    options: what a command line says on top, by dotted path: (the option's name, its text). Raises SettingsInvalid
    with one line for each fault.
    """
    environment = os.environ if environment is None else environment
    if path is None and environment.get("LIPSYNC_CONFIG"):
        path = Path(environment["LIPSYNC_CONFIG"])
    values = _read_file(path) if path else {}
    origins: dict[tuple[str, ...], str] = {}
    for name, setting in STANDARD.items():
        if environment.get(name):
            _put(values, tuple(setting.split(".")), environment[name])
            origins[tuple(setting.split("."))] = name
    for name, text in sorted(environment.items()):
        if name.startswith(PREFIX) and name not in RESERVED:
            keys = tuple(name[len(PREFIX) :].lower().split("__"))
            _put(values, keys, text)
            # A fault may be found at any of the keys on the way down.
            origins.update({keys[:depth]: name for depth in range(1, len(keys) + 1)})
    for setting, (option, text) in (options or {}).items():
        keys = tuple(setting.split("."))
        _put(values, keys, text)
        origins[keys] = option
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        faults = [_fault(dict(item), origins, path) for item in error.errors(include_url=False)]
        raise SettingsInvalid("\n".join(faults), field=".".join(map(str, error.errors()[0]["loc"]))) from error


class _Loader(yaml.SafeLoader):
    """YAML where `off` is a word and no truth value, for no setting has one, and where each key is there once: the
    last one would win, and hide a wrong file."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SettingsInvalid(f"{path}: cannot be read: {error.strerror}; name a file that is there") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise SettingsInvalid(f"{path}{where}: not usable YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsInvalid(f"{path}: must hold keys and values, such as `model_repository: ./model_repository`")
    # A section whose keys are all commented out is an empty one.
    return {key: {} if value is None and key in _sections() else value for key, value in values.items()}


def _put(values: dict[str, Any], keys: tuple[str, ...], text: str) -> None:
    for key in keys[:-1]:
        section = values.setdefault(key, {})
        if not isinstance(section, dict):
            return  # the section itself is at fault, and is reported
        values = section
    values[keys[-1]] = text


def _fault(item: dict[str, Any], origins: Mapping[tuple[str, ...], str], path: Path | None) -> str:
    """One line: where the setting came from, its path, and what is allowed."""
    keys = tuple(str(key) for key in item["loc"])
    told = (origins.get(keys[:depth]) for depth in range(len(keys), 0, -1))
    source = next(filter(None, told), None) or (str(path) if path else "settings")
    model = _sections().get(keys[0], Settings) if len(keys) > 1 else Settings
    if item["type"] == "extra_forbidden":
        allowed = list(model.model_fields)
        near = difflib.get_close_matches(keys[-1], allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{source}: {'.'.join(keys)}: no such setting{hint} (allowed here: {', '.join(allowed)})"
    field = model.model_fields.get(keys[1] if len(keys) > 1 else keys[0])
    allowed_here = f"; {_allowed(field)}" if field else ""
    return f"{source}: {'.'.join(keys)}: {item['msg']}, not {repr(item['input'])[:80]}{allowed_here}"


def _allowed(field: FieldInfo) -> str:
    """The range of a number and what the setting means; pydantic's own message names one bound only."""
    bounds = {
        name: value
        for limit in field.metadata
        for name in ("gt", "ge", "lt", "le")
        if (value := getattr(limit, name, None)) is not None
    }
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    limits = " and ".join(f"{words[name]} {value:g}" for name, value in bounds.items())
    return ": ".join(filter(None, [limits and f"allowed is {limits}", field.description]))


def _sections() -> dict[str, type[Section]]:
    kinds = {name: field.annotation for name, field in Settings.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}
