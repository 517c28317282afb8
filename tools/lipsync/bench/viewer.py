"""A locustfile: viewers who let tenants speak bundled sentences through `Generate` and watch the frames come.

`locust -f tools/bench/locustfile.py --host HOST:PORT` leads here, and so does `lipsync bench load`. Importing locust
patches the whole process for gevent: nothing that locust did not start may import this module.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import gevent  # type: ignore[import-untyped]
import grpc
import grpc.experimental.gevent
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import LocustError

from compositor.manifest import tenant_names
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from lipsync.bench.watching import FIRST_FRAME, FRAME_GAP, LATE_FRAME, TOTAL, Audience, Measured, Watch
from lipsync.sentences import SENTENCES

# After locust's own patch, before the first channel.
grpc.experimental.gevent.init_gevent()

METHOD = "Generate"
_CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
_PAUSE_S = 1.0


class SpeechFailed(Exception):
    """A speech that did not end well: status, machine-readable reason and words of the service."""


class Viewer(User):
    """Asks a tenant, chosen by Zipf, for a sentence, and for the next one when that has been watched to its end (or
    with --flat-out at once); a second after a failure. One channel each."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        options = environment.parsed_options
        assert options is not None
        if not self.host:
            raise LocustError("no host; give the compositor's gRPC address: --host HOST:PORT")
        sentences = [path.read_bytes() for path in sorted(SENTENCES.glob("*.wav"))]
        self._audience = Audience(_tenants(options), options.zipf, sentences)
        self._random = Random()
        self._flat_out: bool = options.flat_out
        self._timeout_s: float = options.call_timeout
        self._again_s = 0.0

    def on_start(self) -> None:
        """Opens the viewer's connection."""
        address = str(self.host).rpartition("/")[2]
        self._channel = grpc.insecure_channel(address, options=_CHANNEL)
        self._stub = pb_grpc.LipsyncStub(self._channel)  # type: ignore[no-untyped-call]

    def on_stop(self) -> None:
        """Closes it."""
        self._channel.close()

    def wait_time(self) -> float:
        """Seconds until the next question."""
        return max(0.0, self._again_s - time.perf_counter())

    @task
    def speak(self) -> None:
        """One speech: an event for its first frame, each gap, each late frame, and the whole."""
        tenant, wav = self._audience.choose(self._random)
        watch, fault, size = Watch(time.perf_counter()), None, 0
        speech = pb.Speech(data=wav, encoding=pb.Speech.WAV)
        call = self._stub.Generate(pb.GenerateRequest(tenant=tenant, speech=speech), timeout=self._timeout_s)
        try:
            for answer in call:
                if answer.WhichOneof("event") == "frame":
                    size += len(answer.frame.data)
                    self._see(watch, answer.frame, tenant)
            if not watch.frames:
                fault = SpeechFailed("the stream ended without a frame")
        except grpc.RpcError as error:
            fault = SpeechFailed(words_of(error))
        finally:
            # A viewer who is stopped in the middle leaves no stream behind.
            call.cancel()
        now_s = time.perf_counter()
        self._again_s = now_s + _PAUSE_S if fault else now_s if self._flat_out else watch.playout_s
        self._fire(TOTAL, now_s - watch.asked_s, tenant, size, fault)

    def _see(self, watch: Watch, frame: pb.Frame, tenant: str) -> None:
        first = not watch.frames
        arrival = watch.arrive(time.perf_counter(), frame.pts_samples)
        self._fire(FIRST_FRAME if first else FRAME_GAP, arrival.waited_s, tenant)
        if arrival.late_s:
            self._fire(LATE_FRAME, arrival.late_s, tenant)

    def _fire(self, name: str, seconds: float, tenant: str, size: int = 0, fault: SpeechFailed | None = None) -> None:
        self.environment.events.request.fire(
            request_type=METHOD,
            name=name,
            response_time=seconds * 1000,
            response_length=size,
            exception=fault,
            context={"tenant": tenant},
        )


def words_of(error: grpc.RpcError) -> str:
    """Status, reason (google.rpc.ErrorInfo) where the service gives one, and message of a failed call."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    reasons = [info.reason for detail in (status.details if status else ()) if detail.Unpack(info)]
    return f"{' '.join([error.code().name, *reasons])}: {error.details()}"


def _tenants(options: Any) -> list[str]:
    named = [name.strip() for name in options.tenants.split(",")]
    return [name for name in named if name] or tenant_names(Path(options.repository))


class Record:
    """Keeps every delay as it was, where locust's own figures are rounded, and this process's CPU time meanwhile."""

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, environment: Environment | None, **_: Any) -> None:
        """Forgets everything: a test starts."""
        self._runner = environment.runner if environment is not None else None
        self._users = 0
        self._delays_ms: dict[str, list[float]] = {name: [] for name in (FIRST_FRAME, FRAME_GAP, LATE_FRAME, TOTAL)}
        self._failures: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()
        self._begun = _clocks()
        self._ended: tuple[float, float] | None = None

    def note(
        self, name: str, response_time: float, exception: Exception | None, context: dict[str, str], **_: Any
    ) -> None:
        """Takes one of the viewers' events in."""
        if name == TOTAL:
            self._tenants[context["tenant"]] += 1
            self._users = max(self._users, self._runner.user_count if self._runner is not None else 0)
        if exception is None:
            self._delays_ms[name].append(response_time)
        else:
            self._failures[str(exception)] += 1

    def end(self, **_: Any) -> None:
        """The test is over."""
        self._ended = _clocks()

    def write(self, environment: Environment, **_: Any) -> None:
        """Leaves everything in the file that --measured names."""
        options = environment.parsed_options
        if options is not None and options.measured:
            # Interrupted in the middle, locust says that it is quitting before it stops the test.
            ended = self._ended or _clocks()
            wall_s, cpu_s = (end - begin for begin, end in zip(self._begun, ended, strict=True))
            measured = Measured(self._users, self._delays_ms, self._failures, self._tenants, wall_s, cpu_s)
            Path(options.measured).write_text(measured.as_json())


def _clocks() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def add_options(parser: LocustArgumentParser) -> None:
    """What locust's command line and web page offer beside its own options."""
    add = parser.add_argument
    add("--tenants", default="", help="Tenants, the most wanted first: a,b,c; all of --repository if empty")
    add("--repository", default="model_repository", help="Where tenants are looked up without --tenants")
    add("--zipf", type=float, default=1.0, help="Exponent of the tenants' popularity; 0: all alike")
    add("--call-timeout", type=float, default=60.0, help="Longest that a speech may take, seconds")
    add("--flat-out", action="store_true", help="Ask again at once, without watching to the end")
    add("--measured", default="", include_in_web_ui=False, help="File for every delay of this process, unrounded")


def check_options(environment: Environment, **_: Any) -> None:
    """Ends locust at its start where no tenant is known."""
    # Loading this file took a second, which the run's time limit would count, as gevent has not looked at the clock.
    gevent.get_hub().loop.update_now()
    if environment.parsed_options is not None and not _tenants(environment.parsed_options):
        raise SystemExit("error: no tenants; name them, the most wanted first: --tenants a,b,c")


record = Record()
for hook, listener in (
    (events.init_command_line_parser, add_options),
    (events.init, check_options),
    (events.test_start, record.begin),
    (events.request, record.note),
    (events.test_stop, record.end),
    (events.quitting, record.write),
):
    hook.add_listener(listener)  # type: ignore[no-untyped-call]
