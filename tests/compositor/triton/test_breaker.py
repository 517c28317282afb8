"""When a server's inference counts as broken, and when it is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compositor.triton.breaker import AGAIN_S, ALONE, PAUSES_S, Breaker, Circuit, Outcome

WORKED, FAILED, SILENT, UNKNOWN = Outcome.WORKED, Outcome.FAILED, Outcome.SILENT, Outcome.UNKNOWN


class Server:
    """Stands for a server that answers inferences, and for the time."""

    def __init__(self) -> None:
        self.inferences = 0
        self.now_s = 1000.0
        self.told: list[str] = []
        self.breaker = Breaker(lambda: self.inferences, self.told.append, lambda: self.now_s)

    def fail(self, model: str, *, works_elsewhere: bool = True) -> None:
        self.breaker.failed(model)
        if works_elsewhere:
            self.breaker.contradicted(model)

    def open(self) -> None:
        for model in ("a", "b"):
            self.fail(model)
        assert self.breaker.circuit is Circuit.OPEN

    def examine(self, **outcomes: Outcome) -> bool:
        self.breaker.begin()
        return self.breaker.end(outcomes)


@pytest.fixture
def server() -> Server:
    return Server()


def test_two_models_in_a_row_that_work_elsewhere_open_it(server: Server) -> None:
    server.fail("a")
    assert server.breaker.closed
    server.fail("b")
    assert not server.breaker.closed
    assert server.told == ["2 models failed in a row"]


def test_models_of_which_others_cannot_tell_have_to_be_more(server: Server) -> None:
    for number in range(ALONE):
        assert server.breaker.closed
        server.fail(str(number), works_elsewhere=False)
    assert not server.breaker.closed


@settings(deadline=None)
@given(st.lists(st.sampled_from(["failed", "contradicted", "examined"]), max_size=40))
def test_one_model_never_opens_it(events: list[str]) -> None:
    server = Server()
    for event in events:
        if event == "examined":
            server.examine(a=FAILED)
        else:
            getattr(server.breaker, event)("a")
        server.now_s += 1
    assert server.breaker.circuit is Circuit.CLOSED


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=60))
def test_where_something_works_in_between_it_stays_closed(models: list[str]) -> None:
    server = Server()
    for model in models:
        server.fail(model)
        server.inferences += 1
    assert server.told == []


def test_what_another_server_says_late_counts_only_if_nothing_worked_meanwhile(server: Server) -> None:
    for model in ("a", "b"):
        server.breaker.failed(model)
    server.inferences += 1
    for model in ("a", "b"):
        server.breaker.contradicted(model)
    assert server.breaker.closed


def test_a_server_where_something_worked_of_late_is_proved(server: Server) -> None:
    assert not server.breaker.proved()
    server.inferences += 1
    assert server.breaker.proved()
    server.now_s += 119
    assert server.breaker.proved()
    server.now_s += 2
    assert not server.breaker.proved()
    server.examine(a=WORKED)
    assert server.breaker.proved()


def test_one_that_is_closed_for_want_of_models_to_try_is_not_proved(server: Server) -> None:
    server.open()
    server.examine()
    assert server.breaker.closed
    assert not server.breaker.proved()


def test_models_that_fail_elsewhere_too_say_nothing(server: Server) -> None:
    for number in range(3 * ALONE):
        server.fail(str(number), works_elsewhere=False)
        server.breaker.forget(str(number))
    assert server.breaker.closed
    # They may have opened it before that is known.
    for number in range(ALONE):
        server.fail(str(number), works_elsewhere=False)
    assert not server.breaker.closed
    server.breaker.forget("0")
    assert server.breaker.closed


def test_what_failed_long_ago_says_nothing(server: Server) -> None:
    server.fail("a")
    server.now_s += 121
    server.fail("b")
    assert server.breaker.closed
    assert server.breaker.suspects == ["b"]


def test_each_failure_that_is_new_is_examined_once(server: Server) -> None:
    breaker = server.breaker
    assert not breaker.is_due(silent=False)
    breaker.failed("a")
    assert breaker.is_due(silent=False)
    server.examine()
    server.now_s += PAUSES_S[0]
    breaker.failed("a")
    assert not breaker.is_due(silent=False)
    breaker.contradicted("a")
    assert breaker.is_due(silent=False)


def test_another_model_that_works_is_the_servers_acquittal(server: Server) -> None:
    server.fail("a")
    server.examine(b=WORKED, c=FAILED)
    assert server.breaker.suspects == []
    server.fail("b")
    assert server.breaker.closed


def test_others_that_fail_when_examined_count(server: Server) -> None:
    server.fail("a")
    assert not server.examine(b=FAILED, c=FAILED)
    assert not server.breaker.closed
    server.examine(b=WORKED)
    server.fail("a")
    server.examine(b=FAILED, c=FAILED)
    assert pauses(server, 1) == [2 * PAUSES_S[0]]


def test_two_that_are_not_answered_open_it_and_one_does_not(server: Server) -> None:
    assert not server.examine(a=SILENT)
    assert server.breaker.closed
    assert server.examine(a=SILENT, b=SILENT)
    assert not server.breaker.closed
    assert server.told == ["it answers no inference"]


def test_one_that_hangs_and_was_opened_by_failures_is_known_to_hang(server: Server) -> None:
    server.open()
    assert not server.examine(a=SILENT)
    assert server.examine(a=SILENT, b=SILENT)
    assert not server.breaker.closed


def test_one_that_fails_and_hangs_at_once_is_known_to_hang(server: Server) -> None:
    server.fail("a")
    assert server.examine(b=FAILED, c=FAILED, d=SILENT, e=SILENT)
    assert server.told == ["3 models failed in a row"]


def test_what_failed_in_an_examination_before_a_caller_was_answered_says_nothing(server: Server) -> None:
    server.fail("a")
    server.breaker.begin()
    server.inferences += 1
    server.breaker.look()
    assert not server.breaker.end({"b": FAILED, "c": FAILED, "d": FAILED})
    assert server.breaker.closed
    assert server.breaker.suspects == []


def examinations(server: Server, seconds: float, outcome: Outcome) -> int:
    """How many there are while a model fails every 50 ms."""
    count, end_s = 0, server.now_s + seconds
    while server.now_s < end_s:
        server.fail("a", works_elsewhere=False)
        if server.breaker.is_due(silent=False):
            server.examine(b=outcome)
            count += 1
        server.now_s += 0.05
    return count


def test_one_broken_model_has_others_examined_ever_more_seldom(server: Server) -> None:
    assert examinations(server, 60, WORKED) <= 60 / AGAIN_S + 1
    assert examinations(server, 600, WORKED) <= 600 / PAUSES_S[1] + 1


def test_one_whose_failures_are_long_ago_is_examined_soon_again(server: Server) -> None:
    examinations(server, 600, WORKED)
    server.now_s += 100
    assert examinations(server, AGAIN_S + 1, WORKED) == 2


def test_a_server_that_falls_silent_or_was_restarted_is_examined_all_the_same(server: Server) -> None:
    server.fail("a")
    server.examine(b=WORKED)
    server.fail("a")
    assert not server.breaker.is_due(silent=False)
    assert server.breaker.is_due(silent=True)
    server.breaker.hurry()
    assert server.breaker.is_due(silent=False)


@pytest.mark.parametrize("outcome", [UNKNOWN, WORKED])
def test_what_is_slow_or_full_does_not_open_it(server: Server, outcome: Outcome) -> None:
    for _ in range(9):
        assert not server.examine(a=outcome, b=UNKNOWN, c=UNKNOWN)
    assert server.breaker.closed


def test_a_server_that_stays_silent_is_not_asked_ever_more(server: Server) -> None:
    assert server.breaker.is_due(silent=True)
    server.examine(a=SILENT)
    server.now_s += AGAIN_S - 0.1
    assert not server.breaker.is_due(silent=True)
    server.now_s += 0.1
    assert server.breaker.is_due(silent=True)


def pauses(server: Server, count: int) -> list[float]:
    """How long each examination is waited for, when none of them succeeds."""
    found = []
    for _ in range(count):
        begin_s = server.now_s
        while not server.breaker.is_due(silent=False):
            server.now_s += 0.5
        found.append(server.now_s - begin_s)
        server.breaker.begin()
        seen = [server.breaker.circuit]
        assert not server.breaker.closed
        server.breaker.end({"a": FAILED, "b": SILENT})
        assert [*seen, server.breaker.circuit] == [Circuit.HALF_OPEN, Circuit.OPEN]
    return found


def test_it_is_tried_again_and_again_with_pauses_that_grow(server: Server) -> None:
    server.open()
    assert pauses(server, 8) == [1, 2, 4, 8, 16, 30, 30, 30]
    server.examine(a=FAILED, b=WORKED)
    assert server.breaker.circuit is Circuit.CLOSED
    assert server.told[1:] == [""]


def test_one_that_breaks_again_soon_is_held_off_and_a_steady_one_is_not(server: Server) -> None:
    server.open()
    server.examine(a=WORKED)
    server.open()
    assert pauses(server, 1) == [2]
    server.examine(a=WORKED)
    server.now_s += 61
    server.open()
    assert pauses(server, 1) == [1]


def test_a_caller_whom_no_other_could_take_and_who_is_answered_closes_it(server: Server) -> None:
    server.open()
    server.breaker.look()
    assert not server.breaker.closed
    server.inferences += 1
    server.breaker.look()
    assert server.breaker.circuit is Circuit.CLOSED


def test_where_there_is_nothing_to_try_only_requests_can_tell(server: Server) -> None:
    server.open()
    server.examine()
    assert server.breaker.closed


def test_one_that_is_back_is_tried_at_once(server: Server) -> None:
    server.open()
    pauses(server, 6)
    assert not server.breaker.is_due(silent=False)
    server.breaker.hurry()
    assert server.breaker.is_due(silent=False)
    assert server.examine(a=UNKNOWN) is False
    assert not server.breaker.closed


def test_those_that_were_tried_come_last_the_next_time(server: Server) -> None:
    for model in "abcd":
        server.fail(model)
    for tried in ("ab", "cd", "ab"):
        assert server.breaker.suspects[:2] == list(tried)
        server.examine(**dict.fromkeys(tried, UNKNOWN))
    assert not server.breaker.closed


def test_those_that_work_elsewhere_are_tried_first(server: Server) -> None:
    server.fail("a", works_elsewhere=False)
    server.fail("b")
    assert server.breaker.suspects == ["b", "a"]
    assert [server.breaker.known_to_work(model) for model in "abc"] == [False, True, False]
