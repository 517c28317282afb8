"""Two compositors on one server and, in any order, all that may happen to them: the budget holds, nobody who is served
is unloaded, what is answered is made from the files that are there, and all recovers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from compositor.deadline import Deadline
from compositor.errors import LipsyncError, Overloaded, TenantBroken, TritonUnavailable
from compositor.residency.models import OutOfMemory, State, Use
from compositor.triton.connection import ModelNotLoaded, NoAnswer

from ..triton.model_server import ModelServer, VirtualLoop
from .test_residency import CPU, GPUS, NAMES, SIZE, World

MODELS = st.sampled_from([*NAMES, "encoder"])
BOTH = st.sampled_from([0, 1])
FAILURES = [
    OutOfMemory("no memory"),
    TenantBroken("does not load"),
    NoAnswer("no answer"),
    TritonUnavailable("the connection ended"),
]
EXPECTED = (Overloaded, TenantBroken, TritonUnavailable, NoAnswer)
MIN_RESIDENT_S = 3.0


class Client:
    """The server as one compositor sees it, which notes whom the compositor wrongs."""

    def __init__(self, server: ModelServer) -> None:
        self.server, self.endpoint = server, server.endpoint
        self.serving: Counter[str] = Counter()
        self.dropped: set[str] = set()
        self.wrong: list[str] = []
        self._seen: dict[str, Use] = {}

    async def load(self, model: str, gpu: int | None = None) -> None:
        await self.server.load(model, gpu)

    async def unload(self, model: str) -> None:
        if self.serving[model]:
            self.wrong.append(f"{model} was unloaded and has {self.serving[model]} leases")
        idle_s = self.server.clock_s() - self._seen[model].last_s if model in self._seen else MIN_RESIDENT_S
        if idle_s < MIN_RESIDENT_S and model not in self.dropped:
            self.wrong.append(f"{model} was unloaded {idle_s:.3f} s after its last use")
        self.dropped.discard(model)
        await self.server.unload(model)

    async def warm(self, model: str) -> None:
        await self.server.warm(model)

    async def states(self) -> dict[str, str]:
        return await self.server.states()

    async def uses(self) -> dict[str, Use]:
        self._seen = await self.server.uses()
        return self._seen

    async def placed(self, model: str) -> int | None:
        return await self.server.placed(model)


class Machine(RuleBasedStateMachine):
    """Rules are what the world does; requests and all else go on side by side while time passes."""

    @initialize(
        gpus=st.booleans(),
        policy=st.sampled_from(["lfu", "lru"]),
        max_mb=st.sampled_from([0, 3 * SIZE // 1_000_000]),
        headroom=st.integers(0, 2),
        loads=st.integers(1, 3),
    )
    def start(self, gpus: bool, policy: str, max_mb: int, headroom: int, loads: int) -> None:
        logging.disable(logging.CRITICAL)
        self.loop = VirtualLoop()
        self.folder = Path(tempfile.mkdtemp())
        self.tasks: set[asyncio.Task[None]] = set()
        self.wrong: list[str] = []
        self.world = World(
            self.folder,
            GPUS if gpus else (CPU,),
            policy=policy,
            max_mb=max_mb,
            headroom=headroom,
            concurrent_loads=loads,
            min_resident_s=MIN_RESIDENT_S,
            sweep_s=0.5,
            failed_s=0,
        )
        self.server = self.world.server
        self.server.watch = self.look_at_budget
        self.clients = [Client(self.server), Client(self.server)]
        self.compositors = [self.world.another(client) for client in self.clients]
        self.watching = [self.loop.create_task(compositor.watch()) for compositor in self.compositors]
        self.play(asyncio.sleep(0.1))

    def look_at_budget(self) -> None:
        try:
            self.world.within_budget()
        except AssertionError as error:
            self.wrong.append(str(error))

    def play(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def request(self, which: int, name: str, seconds: float) -> None:
        """A request as the fleet makes it."""
        compositor, client = self.compositors[which], self.clients[which]
        expected = self.world.files.stamp(name)
        stamp: int | None = None
        while stamp is None:
            with contextlib.suppress(ModelNotLoaded):
                async with compositor.lease(name, Deadline.after(1000)):
                    client.serving[name] += 1
                    try:
                        stamp = await self.server.infer(name, seconds)
                    finally:
                        client.serving[name] -= 1
            if stamp is None:
                compositor.forget(name, lost=True)
        if stamp < expected:
            self.wrong.append(f"{name} was served from older files")

    async def tolerant(self, which: int, name: str, seconds: float) -> None:
        try:
            await self.request(which, name, seconds)
        except EXPECTED:
            pass
        except LipsyncError as error:
            self.wrong.append(repr(error))

    @rule(which=BOTH, name=MODELS, count=st.integers(1, 4), seconds=st.sampled_from([0.01, 0.3, 2.0]))
    def ask(self, which: int, name: str, count: int, seconds: float) -> None:
        for _ in range(count):
            self.tasks.add(self.loop.create_task(self.tolerant(which, name, seconds)))

    @rule(seconds=st.sampled_from([0.0, 0.0015, 0.05, 0.2, 1.0, 4.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.play(asyncio.sleep(seconds))

    @rule(number=st.integers(0, 100))
    def cancel(self, number: int) -> None:
        under_way = [task for task in self.tasks if not task.done()]
        if under_way:
            under_way[number % len(under_way)].cancel()

    @rule(which=BOTH, name=MODELS)
    def forget(self, which: int, name: str) -> None:
        self.compositors[which].forget(name)

    @rule(name=MODELS)
    def replace(self, name: str) -> None:
        self.world.files.replace(name)
        for each in self.compositors:
            each.replaced(name)

    @rule(which=BOTH, name=MODELS)
    def drop(self, which: int, name: str) -> None:
        self.clients[which].dropped.add(name)
        self.play(self.compositors[which].drop(name))

    @rule(failure=st.sampled_from(FAILURES))
    def fail_a_load(self, failure: LipsyncError) -> None:
        self.server.failures.append(failure)

    @rule()
    def restart(self) -> None:
        self.server.restart()
        self.play(self.forget_all())

    @rule(name=MODELS)
    def unload_by_hand(self, name: str) -> None:
        self.play(self.server.unload(name))

    async def forget_all(self) -> None:
        for each in self.compositors:
            each.forget_all()

    @invariant()
    def nothing_went_wrong(self) -> None:
        wrong = [*self.wrong, *(each for client in self.clients for each in client.wrong)]
        assert not wrong, wrong

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.play(self.recover())
            self.nothing_went_wrong()
        finally:
            self.loop.close()
            shutil.rmtree(self.folder)
            logging.disable(logging.NOTSET)

    async def recover(self) -> None:
        """When nothing more happens, everything is as it should be."""
        self.server.failures.clear()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=600)
            assert all(task.done() for task in self.tasks), "somebody waits for ever"
            await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.sleep(MIN_RESIDENT_S + 5)
        for which, compositor in enumerate(self.compositors):
            assert compositor.load == 0
            for name in NAMES:
                await self.patient(which, name)
        await asyncio.sleep(MIN_RESIDENT_S + 5)
        for compositor in self.compositors:
            assert {each.state for each in compositor.report()} <= {State.READY, State.ABSENT}
            names = {each.name for each in compositor.report()}
            assert names == self.server.ready()
            await compositor.close()
        for task in self.watching:
            task.cancel()
        await asyncio.gather(*self.watching, return_exceptions=True)
        await asyncio.sleep(5)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def patient(self, which: int, name: str, tries: int = 20) -> None:
        try:
            await self.request(which, name, 0.01)
        except Overloaded as error:
            assert tries, f"no room for {name} for ever"
            await asyncio.sleep(error.retry_after_s or 0)
            await self.patient(which, name, tries - 1)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
