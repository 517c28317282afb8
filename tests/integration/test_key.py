"""A Triton that restricts loads and shared memory by a key, and a service that has it, or another, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.settings import Settings, TritonSettings
from lipsync import tenant_list
from lipsync.tenant_list import list_tenants
from lipsync.tritonserver import EmbeddedTriton, TritonHome

from ..conftest import ServiceThread, connect

pytestmark = pytest.mark.triton

KEY = "a key"
ONE = np.zeros((1, 32, 16, 16), np.float32).tobytes()


class Restricted(EmbeddedTriton):
    """Wants a key."""

    def _command(self, home: TritonHome, server_id: str) -> list[str]:
        restricted = f"--grpc-restricted-protocol=model-repository,shared-memory:lipsync-key={KEY}"
        return [*super()._command(home, server_id), restricted]


@pytest.fixture(scope="module")
def restricted(repository: Path, triton_home: Path) -> Iterator[EmbeddedTriton]:
    with Restricted(repository) as triton:
        yield triton


@contextlib.contextmanager
def serving(repository: Path, triton: EmbeddedTriton, key_file: Path | None) -> Iterator[str]:
    """A service's address."""
    settings = {"model_repository": repository, "server": {"port": 0}, "http": {"port": 0}}
    endpoints = {"endpoints": triton.grpc, "key_file": key_file}
    service = ServiceThread(Settings.model_validate({**settings, "triton": endpoints}))
    service.start()
    try:
        yield service.address
    finally:
        service.stop()


def ask(address: str) -> list[bytes]:
    for stub in connect(address):
        answer = stub.Composite(pb.CompositeRequest(tenant="plain", start=0, features=ONE), timeout=60)
        return [frame.data for frame in answer.frames]
    return []


def test_with_the_key(
    repository: Path, restricted: EmbeddedTriton, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    with caplog.at_level("INFO"), serving(repository, restricted, tmp_path / "key") as address:
        assert len(ask(address)) == 1
    assert "shared memory mapped" in caplog.text


@pytest.mark.parametrize("key", [None, "another"])
def test_without_it(repository: Path, restricted: EmbeddedTriton, tmp_path: Path, key: str | None) -> None:
    path = None if key is None else tmp_path / "key"
    if path and key:
        path.write_text(key)
    with serving(repository, restricted, path) as address, pytest.raises(grpc.RpcError) as caught:
        ask(address)
    assert "name the file that holds it in the setting triton.key_file" in str(caught.value)


def test_what_is_loaded_is_told_to_who_has_the_key(
    repository: Path, restricted: EmbeddedTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenant_list, "PATIENCE_S", 60.0)
    (tmp_path / "key").write_text(KEY)
    settings = TritonSettings(endpoints=(restricted.grpc,), key_file=tmp_path / "key")
    assert list_tenants(repository, settings)[1] == {}
    _, refused = list_tenants(repository, TritonSettings(endpoints=(restricted.grpc,)))
    assert "the setting triton.key_file" in refused[restricted.grpc]
