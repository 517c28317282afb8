"""Whether inference works at a server: what failed there goes in; whether requests should go elsewhere where others can
take them, and whether it is to be examined, comes out. Only arithmetic.

A server whose GPU fell off its bus fails every inference, or answers none, and answers pings all the same. It is told
from a model that is broken, and from a server that is slow or full, by this:

- A request that failed as a broken server's would (`connection.blames_server`: no refusal, no queue that is full, no
  model that does not load) is made again at another server, if that has the model or room for it (`opinions`). Where it
  fails there, too, and anything worked there of late, the model is at fault, and no server; where nothing did, it is
  evidence against both.
- Where it works there, its tenant has moved; and it is evidence against the first server until anything works there.
  One model is never enough, whatever it does: the circuit opens for `CONTRADICTED` in a row that work elsewhere, or for
  `ALONE` where others could not be asked. Other models of the server are examined at once (`examination`), by an
  inference of zeros each: one that works clears it, one that fails counts. While one model goes on failing beside
  others that work, they are examined ever more seldom.
- A server is silent that has requests and answers none. What is loaded was inferred once before, so a first inference
  that takes minutes (engines that are built) is part of a load; what callers wait for all the same sets the measure: a
  server is silent only after `SILENT_S`, and after `SLOWER` times the slowest answer of late. Then models are examined,
  and waited for as long again; if nothing at all is answered meanwhile, and two or more were asked, the circuit opens.
  One GPU that hangs beside others of its server that answer is not seen so. Of a real Triton on 2 cores, with 24 other
  busy processes and 24 requests at a time for 6 tenants' models, the longest silence in 872 answers was 0.3 s.

While it is open, requests go elsewhere where others can take them, and here where not, as with the only server there
is: nothing is refused for it.
After a pause, which grows, it is half open: no request is risked, models that it has are examined again. Whatever
works, in an examination or for a caller whom no other could take, closes it.

To be wrong costs tenants a load elsewhere, and one on their way back.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

SILENT_S = 4.0
"""A server that answers no inference for so long is examined."""
SLOWER = 3.0
"""So many times the slowest answer of late is waited for at least."""
CONTRADICTED = 2
"""So many models that fail in a row, and work elsewhere, open the circuit."""
ALONE = 3
"""So many that fail in a row open it whether or not they are known to work elsewhere."""
PAUSES_S = (1.0, 30.0)
"""Between examinations of a server whose circuit is open: at first, and at most."""
AGAIN_S = 10.0
"""Between examinations that nothing was answered to, of a server whose circuit stays closed; and, at first, before what
fails is looked into again, where the last time something worked."""
_STEADY_S = 60.0
"""A server whose circuit was closed for so long is examined quickly again."""
_FRESH_S = 120.0
"""What failed longer ago than that says nothing of the present."""


class Circuit(enum.Enum):
    """Whether requests may take this way; the words are those of circuit breakers everywhere."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """Open, and examined right now."""


class Outcome(enum.Enum):
    """How an inference went that was made to see whether it works."""

    WORKED = "worked"
    FAILED = "failed"
    SILENT = "silent"
    """No answer came, to this or any other, for as long as was waited."""
    UNKNOWN = "unknown"


@dataclass
class _Failure:
    """Of one model."""

    at_s: float
    contradicted: bool = False
    """It works elsewhere."""


class Breaker:
    """Of one server."""

    def __init__(
        self,
        inferences: Callable[[], int],
        changed: Callable[[str], None] = lambda reason: None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """inferences: how many the server has answered as it should. changed: hears why the circuit opened, and "" when
        it closes. now_s: seconds that only grow."""
        self.circuit = Circuit.CLOSED
        self.closed = True
        """Whether requests may go there as to any other."""
        self._inferences, self._changed, self._now_s = inferences, changed, now_s
        self._seen = inferences()
        self._failures: dict[str, _Failure] = {}
        """Of models that failed in a row."""
        self._by_failures = False
        """Whether the circuit is open for them."""
        self._news = False
        """Whether there is evidence since the last examination."""
        self._pause_s = PAUSES_S[0]
        self._next_s = -math.inf
        self._closed_s = -math.inf
        self._worked_s = -math.inf
        self._begun = self._seen
        """The count of inferences when the last examination began."""
        self._calm_s = AGAIN_S
        self._calm_until_s = -math.inf
        """Until when failures are not looked into, as something worked when they were last."""

    @property
    def suspects(self) -> list[str]:
        """The models that failed, those first that are known to work elsewhere, and of these the one that was not tried
        for the longest."""
        return sorted(self._failures, key=lambda model: not self._failures[model].contradicted)

    def known_to_work(self, model: str) -> bool:
        """Whether the model failed here and worked elsewhere."""
        return model in self._failures and self._failures[model].contradicted

    def proved(self) -> bool:
        """Whether an inference worked here of late, so that what fails here may be to blame itself."""
        self.look()
        return self._now_s() - self._worked_s < _FRESH_S

    def failed(self, model: str) -> None:
        """An inference of the model failed here as it would at a broken server."""
        self.look()
        if model not in self._failures:
            self._news = True
        contradicted = self.known_to_work(model)
        self._failures[model] = _Failure(self._now_s(), contradicted)
        self._judge()

    def contradicted(self, model: str) -> None:
        """What had failed here worked at another server. It says nothing where anything worked here meanwhile."""
        self.look()
        if model in self._failures:
            self._news = self._news or not self._failures[model].contradicted
            self._failures[model].contradicted = True
            self._judge()

    def forget(self, model: str) -> None:
        """What failed here failed elsewhere, too, or is not there any more."""
        self._failures.pop(model, None)
        if self._by_failures and not self._is_enough():
            self._close()

    def look(self) -> None:
        """Takes in what has worked, and forgets what is long ago. To be called now and then."""
        if self._inferences() != self._seen:
            self.worked()
        fresh_s = self._now_s() - _FRESH_S
        if self.closed:
            self._failures = {model: each for model, each in self._failures.items() if each.at_s > fresh_s}

    def worked(self) -> None:
        """An inference was answered as it should be."""
        self._seen = self._inferences()
        self._worked_s = self._now_s()
        self._acquit()

    def hurry(self) -> None:
        """The server was down and is back: it may be another one."""
        self._next_s = self._calm_until_s = -math.inf

    def is_due(self, silent: bool) -> bool:
        """Whether the server is to be examined now. silent: whether it is at this moment."""
        now_s = self._now_s()
        if self.closed and not silent and (not self._news or now_s < self._calm_until_s):
            return False
        return now_s >= self._next_s

    def begin(self) -> None:
        """An examination begins."""
        self._begun = self._inferences()
        self._news = False
        if not self.closed:
            self.circuit = Circuit.HALF_OPEN

    def end(self, outcomes: Mapping[str, Outcome]) -> bool:
        """What came of an examination, by model; whether the server hangs, and the circuit is open."""
        found = list(outcomes.values())
        # What failed before others worked says nothing.
        if Outcome.WORKED in found or self._inferences() != self._begun:
            self._calm()
            self.worked()
            return False
        hangs = found.count(Outcome.SILENT) > 1
        if not self.closed:
            self._go_on(tried=outcomes)
            return hangs
        for model, outcome in outcomes.items():
            if outcome is Outcome.FAILED:
                self.failed(model)
        if not self.closed:
            return hangs
        if hangs:
            self._open("it answers no inference")
            return True
        self._next_s = self._now_s() + (AGAIN_S if Outcome.SILENT in found else PAUSES_S[0])
        self._news = False
        return False

    def _calm(self) -> None:
        """Something worked when the server was examined: one model that always fails is not to have the others examined
        without end."""
        if self.closed:
            now_s = self._now_s()
            again = now_s - self._calm_until_s <= _STEADY_S
            self._calm_s = min(2 * self._calm_s, PAUSES_S[1]) if again else AGAIN_S
            self._calm_until_s = now_s + self._calm_s

    def _acquit(self) -> None:
        self._failures.clear()
        self._news = False
        self._close()

    def _go_on(self, tried: Collection[str]) -> None:
        """The circuit stays open, for longer; others come first the next time. With nothing to try, only requests can
        tell."""
        if not tried:
            self._acquit()
            return
        for model in [model for model in self._failures if model in tried]:
            self._failures[model] = self._failures.pop(model)
        self.circuit = Circuit.OPEN
        self._pause_s = min(2 * self._pause_s, PAUSES_S[1])
        self._next_s = self._now_s() + self._pause_s

    def _judge(self) -> None:
        if self.closed and self._is_enough():
            self._open(f"{len(self._failures)} models failed in a row")
            self._by_failures = True

    def _is_enough(self) -> bool:
        contradicted = sum(each.contradicted for each in self._failures.values())
        return contradicted >= CONTRADICTED or len(self._failures) >= ALONE

    def _open(self, reason: str) -> None:
        now_s = self._now_s()
        steady = now_s - self._closed_s > _STEADY_S
        self._pause_s = PAUSES_S[0] if steady else min(2 * self._pause_s, PAUSES_S[1])
        self.circuit, self.closed = Circuit.OPEN, False
        self._next_s = now_s + self._pause_s
        self._changed(reason)

    def _close(self) -> None:
        self._by_failures = False
        if not self.closed:
            self.circuit, self.closed = Circuit.CLOSED, True
            self._closed_s = self._now_s()
            self._changed("")
