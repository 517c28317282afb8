"""The connection to one Triton: requests go out, answers come in, and what goes wrong comes as our errors.

With `channel`, on which it speaks, and `control` and `inference`, which speak through it, the only importer of
tritonclient.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tritonclient.grpc import InferenceServerClientPlugin, InferInput, InferRequestedOutput, InferResult, aio
from tritonclient.utils import InferenceServerException

from ..errors import (
    DeadlinePassed,
    InferenceFailed,
    LipsyncError,
    Overloaded,
    SettingsInvalid,
    TenantBroken,
    TritonUnavailable,
)
from .channel import Abandoned, Answer, Channel, Client

KEY_HEADER = "triton-grpc-protocol-lipsync-key"
_FADE = 0.98
"""What each answer leaves of the slowest one before it."""
FAREWELL_S = 3.0
"""How long a connection that is to end still waits for what Triton owes it."""
_UNAWAITED_S = 60.0
"""How much longer than its caller waits for it an inference may take, before it is cancelled."""
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    # By default a server that was away for long is looked for every two minutes only.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class ModelNotLoaded(LipsyncError):
    """Triton does not have the model right now; loading it helps."""


class RegionLost(TritonUnavailable):
    """Triton does not know the shared memory region, having been restarted since."""


class GivenUp(TritonUnavailable):
    """Triton hangs, and the request with it: what it does with the request when it goes on is not known."""


class Unresponsive(TritonUnavailable):
    """Triton did not answer in time what no caller had asked. It may the next time, or another Triton may."""


class KeyRefused(LipsyncError):
    """Triton restricts what was asked by a key, and was given none or another."""


class NoAnswer(DeadlinePassed):
    """The wait for Triton's answer ended; whether it still works on the request is not known."""


_REFUSALS = (TritonUnavailable, ModelNotLoaded, Overloaded, KeyRefused)
"""What says nothing of inference."""


def translate(error: InferenceServerException) -> LipsyncError:
    """Triton's error as ours. UNAVAILABLE has four meanings, so the message decides (seen on Triton 2.51)."""
    status, message = str(error.status()).removeprefix("StatusCode."), str(error.message())
    if "protocol is restricted" in message:
        return KeyRefused("Triton restricts this by a key: name the file that holds it in the setting triton.key_file")
    if "Unable to find shared memory region" in message:
        return RegionLost(message)
    if (
        "has no available versions" in message
        or "not at ready state" in message
        or (status == "NOT_FOUND" and "is not found" in message)
    ):
        return ModelNotLoaded(message)
    if "Exceeds maximum queue size" in message:
        return Overloaded("Triton's queue for this tenant is full", retry_after_s=0.2)
    if "Request timeout expired" in message:
        return Overloaded("Triton's queue for this tenant is too long for the time given", retry_after_s=0.5)
    if status == "CANCELLED" and not message.startswith("Locally"):
        return TritonUnavailable("Triton ended the request; it may be stopping", retry_after_s=1)
    if status in ("DEADLINE_EXCEEDED", "CANCELLED"):
        return NoAnswer("Triton did not answer in time")
    if status == "UNAVAILABLE":
        return TritonUnavailable("Triton cannot be reached; it may be restarting", retry_after_s=1)
    return InferenceFailed(f"Triton failed: {message}")


def blames_server(error: LipsyncError) -> bool:
    """Whether an inference failed as all would at a server that is broken: by Triton's INTERNAL or UNKNOWN, or with an
    answer that is something else than was asked for. It may be the model's fault all the same. A load that failed is no
    inference, and says nothing of it."""
    cause = error.__cause__
    if isinstance(cause, InferenceServerException):
        # With another status Triton refuses the request, before any inference.
        return isinstance(error, InferenceFailed) and str(cause.status()) in (
            "StatusCode.INTERNAL",
            "StatusCode.UNKNOWN",
        )
    return cause is None and isinstance(error, (InferenceFailed, TenantBroken))


def read_key(path: Path) -> str:
    """The key that a file holds. Raises SettingsInvalid where there is none."""
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it must be plain text"
        raise SettingsInvalid(f"triton.key_file: {path} cannot be read: {reason}", field="triton.key_file") from error
    if not key:
        raise SettingsInvalid(f"triton.key_file: {path} is empty", field="triton.key_file")
    return key


class _Key(InferenceServerClientPlugin):  # type: ignore[misc]
    """Puts the key on every request."""

    def __init__(self, key: str) -> None:
        self._header = {KEY_HEADER: key}

    def __call__(self, request: Any) -> None:
        request.headers.update(self._header)


class Connection:
    """One Triton server, by its address host:port."""

    def __init__(self, endpoint: str, key: str | None = None, most_owed: int = 64) -> None:
        """key: what Triton asks for where it restricts a protocol. most_owed: inferences without an answer, those that
        nobody waits for any more among them."""
        self.endpoint = endpoint
        self._key = key
        self._most_owed = most_owed
        self.answers = 0
        """How many requests were answered, however."""
        self.inferred = 0
        """How many of them were inferences, that worked or failed; what was refused is none."""
        self.slowest_s = 0.0
        """What the slowest inference of late took, of those that are measured."""
        self._inferring = 0
        self._unanswered = False
        """Whether an inference was given up since the last that was answered."""
        self._answered_s = 0.0
        """When an inference was answered last, or asked for where none was under way."""
        self._channel = self._connect()
        self._hangs = False
        self._abandoned: dict[Channel, asyncio.Task[None]] = {}
        """Channels on which an answer may still be owed, each with the task that then closes it."""

    def _connect(self) -> Channel:
        client = aio.InferenceServerClient(self.endpoint, channel_args=_CHANNEL)
        if self._key is not None:
            client.register_plugin(_Key(self._key))
        return Channel(client)

    async def settle(self) -> None:
        """Waits a moment for what Triton owes, unless it hangs."""
        if not self._hangs:
            await asyncio.gather(*(channel.settle(FAREWELL_S) for channel in (self._channel, *self._abandoned)))

    async def close(self) -> None:
        """Cancels what is under way, and ends the connection."""
        channels = [self._channel, *self._abandoned]
        for closing in self._abandoned.values():
            closing.cancel()
        await asyncio.gather(*(channel.close() for channel in channels))

    async def ask(self, request: Callable[[Client], Awaitable[Answer]]) -> Answer:
        """What Triton answers to anything but an inference. Raises what `translate` makes of its error, and GivenUp."""
        self._require_answers()
        return await self._answer_to(self._channel.ask(request))

    async def infer(
        self,
        model: str,
        inputs: Sequence[InferInput],
        outputs: Sequence[InferRequestedOutput],
        wait_s: float,
        headers: Mapping[str, str] | None = None,
        measured: bool = True,
    ) -> InferResult:
        """An inference, whose answer is awaited for so long; Triton makes it also where nobody waits any more.

        measured: whether it says how long inferences take. Raises what `ask` raises, NoAnswer, and Overloaded where
        Triton owes too many answers.
        """
        self._require_answers()
        if self._channel.owed + sum(channel.owed for channel in self._abandoned) >= self._most_owed:
            raise Overloaded("Triton owes too many answers", retry_after_s=1)
        request = partial(_infer, model, inputs, outputs, headers, wait_s + _UNAWAITED_S)
        begin_s = time.monotonic()
        if not self._inferring and not self._unanswered:
            self._answered_s = begin_s
        self._inferring += 1
        answered = True
        try:
            return await self._answer_to(self._channel.infer(request, wait_s, self._take_late))
        except _REFUSALS as error:
            answered = False
            self._unanswered |= isinstance(error, GivenUp)
            raise
        except (DeadlinePassed, asyncio.CancelledError):
            answered, self._unanswered = False, True
            raise
        finally:
            self._inferring -= 1
            if answered:
                self.inferred += 1
                self._unanswered = False
                self._answered_s = time.monotonic()
                if measured:
                    self.slowest_s = max(self._answered_s - begin_s, _FADE * self.slowest_s)

    def silent_s(self) -> float:
        """For how long inferences have been waited for, and none was answered."""
        return time.monotonic() - self._answered_s if self._inferring or self._unanswered else 0.0

    async def ping(self, wait_s: float) -> bool:
        """Whether Triton takes requests. Raises TritonUnavailable, and NoAnswer after `wait_s`."""
        # Not ServerReady: by Triton's default it says no while any model is loaded or unloaded, and for as long as one
        # that failed to load is in its index. While Triton 2.51 starts nothing answers, and when it stops both raise.
        live = await self._answer_to(self._channel.ask(lambda client: client.is_server_live(client_timeout=wait_s)))
        self._hangs = False
        return bool(live)

    def give_up(self) -> None:
        """Triton accepts requests and does not answer: those in flight fail at once, with GivenUp, and so do further
        ones until a `ping` is answered, on a new connection: the old one may lead to a machine that is gone."""
        self._hangs = True
        self.let_go()

    def let_go(self) -> None:
        """The requests in flight fail at once, with GivenUp; further ones go out on a new connection."""
        abandoned, self._channel = self._channel, self._connect()
        abandoned.abandon()
        self._abandoned[abandoned] = closing = asyncio.create_task(_close(abandoned))
        closing.add_done_callback(lambda _: self._abandoned.pop(abandoned))

    def _require_answers(self) -> None:
        if self._hangs:
            raise GivenUp("Triton does not answer", retry_after_s=1)

    async def _answer_to(self, asked: Coroutine[Any, Any, Answer]) -> Answer:
        """The answer to a request. Raises our errors."""
        try:
            answer = await asked
        except InferenceServerException as error:
            fault = translate(error)
            if not isinstance(fault, (NoAnswer, TritonUnavailable)):
                self.answers += 1
            raise fault from error
        except Abandoned:
            raise GivenUp("Triton does not answer", retry_after_s=1) from None
        except asyncio.TimeoutError:
            raise NoAnswer("Triton did not answer in time") from None
        self.answers += 1
        return answer

    def _take_late(self, inference: asyncio.Future[InferResult]) -> None:
        """An answer that nobody waited for any more shows that Triton works, if not how fast."""
        if inference.cancelled():
            return
        error = inference.exception()
        if error is None or (
            isinstance(error, InferenceServerException) and not isinstance(translate(error), (NoAnswer, *_REFUSALS))
        ):
            self.answers += 1
            self.inferred += 1
            self._unanswered = False
            self._answered_s = time.monotonic()


async def _close(channel: Channel) -> None:
    await channel.settle()
    await channel.close()


async def _infer(
    model: str,
    inputs: Sequence[InferInput],
    outputs: Sequence[InferRequestedOutput],
    headers: Mapping[str, str] | None,
    deadline_s: float,
    client: Client,
) -> InferResult:
    return await client.infer(model, inputs, outputs=outputs, client_timeout=deadline_s, headers=headers)
