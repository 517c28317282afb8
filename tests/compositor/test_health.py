from __future__ import annotations

from compositor.health import Health


async def test_only_changes_are_told() -> None:
    answers = iter([False, True, True, False, True])
    told: list[bool] = []

    async def check() -> bool:
        return next(answers)

    async def changed(serving: bool) -> None:
        told.append(serving)

    health = Health(check, changed)
    states = []
    for _ in range(5):
        await health.update()
        states.append(health.serving)
    assert states == [False, True, True, False, True]
    assert told == [True, False, True]
