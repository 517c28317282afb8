"""What a Triton is asked to see whether it can serve: its health, its key, control, repository, backend, shared memory
and clock. A model of a few bytes is loaded, run and unloaded; nothing else is touched."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as wire
from onnx import TensorProto
from tritonclient.utils import InferenceServerException

from compositor.manifest import tenant_names
from lipsync.doctor import Finding, State
from lipsync.graph_builder import GraphBuilder

KEY_HEADER = "triton-grpc-protocol-lipsync-key"
SKEW_S = 2.0
"""Difference of clocks from which on it matters who of several compositors last used a model."""
_WAIT_S = 5.0
_LOAD_S = 60.0
_CONFIG = {
    "backend": "onnxruntime",
    "max_batch_size": 0,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}],
    "instance_group": [{"count": 1, "kind": "KIND_AUTO"}],
}


class _Wrong(Exception):
    """What is found leaves nothing to ask further."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding


class _Examination:
    """One Triton, by its address host:port. headers: with the key, where there is one."""

    def __init__(self, endpoint: str, repository: Path, headers: dict[str, str]) -> None:
        self._name = f"Triton {endpoint}"
        self._repository, self._headers = repository, headers
        self._model = f"lipsync_doctor_{secrets.token_hex(4)}"
        self._asked_s = self._answered_s = 0.0
        self.client: Any = wire.InferenceServerClient(endpoint)

    def findings(self) -> Iterator[Finding]:
        try:
            yield self._health()
            yield self._control()
            yield self._repository_seen()
            try:
                yield self._backend()
                yield self._clock()
            finally:
                with contextlib.suppress(InferenceServerException):
                    self.client.unload_model(self._model, headers=self._headers)
            yield self._memory()
        except _Wrong as wrong:
            yield wrong.finding

    def _found(self, state: State, found: str, advice: str = "") -> Finding:
        return Finding(self._name, state, found, advice)

    def _wrong(self, found: str, advice: str) -> _Wrong:
        return _Wrong(self._found(State.WRONG, found, advice))

    def _health(self) -> Finding:
        try:
            # By Triton's default ServerReady says no while any model is loaded or unloaded.
            if not self.client.is_server_live(client_timeout=_WAIT_S):
                raise self._wrong("it answers, but takes no requests", "see its log")
            version = self.client.get_server_metadata(client_timeout=_WAIT_S).version
        except InferenceServerException as error:
            if "UNIMPLEMENTED" in str(error.status()):
                found, advice = "something else answers there", "give Triton's gRPC port, 8001 unless told otherwise"
            elif "DEADLINE" in str(error.status()):
                found, advice = f"nothing answers within {_WAIT_S:.0f} s", "see its log; start it again if it hangs"
            else:
                found = "it cannot be reached"
                advice = "start it (`lipsync triton`, or `lipsync up` for both), or set triton.endpoints"
            raise self._wrong(found, advice) from error
        return self._found(State.OK, f"version {version} takes requests")

    def _control(self) -> Finding:
        """Unloading what is not there is allowed, in explicit mode and with the key only."""
        try:
            self.client.unload_model(self._model, headers=self._headers, client_timeout=_WAIT_S)
        except InferenceServerException as error:
            said = str(error.message())
            if "restricted" in said:
                advice = "set triton.key_file to the file with the value of --grpc-restricted-protocol"
                raise self._wrong("it wants another key", advice) from error
            advice = "start it with --model-control-mode=explicit"
            raise self._wrong(f"models cannot be loaded and unloaded: {said}", advice) from error
        return self._found(State.OK, "models may be loaded and unloaded")

    def _repository_seen(self) -> Finding:
        """Whether it has the same tenants as the model repository here."""
        index = self.client.get_model_repository_index(headers=self._headers, client_timeout=_LOAD_S)
        seen = {model.name for model in index.models}
        here = set(tenant_names(self._repository)) if self._repository.is_dir() else set[str]()
        if missing := sorted(here - seen):
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            advice = f"give it the same folder: --model-repository={self._repository.absolute()}"
            return self._found(State.WRONG, f"it does not see {len(missing)} of {len(here)} tenants ({some})", advice)
        return self._found(State.OK, f"it sees all of {len(here)} tenants")

    def _backend(self) -> Finding:
        """Loads, runs and compares a model that doubles."""
        graph = GraphBuilder("doctor")
        graph.node("Add", [graph.input("x", [4]), "x"], "double", output="y")
        graph.output("y", [4], TensorProto.FLOAT)
        values = np.arange(4, dtype=np.float32)
        tensor = wire.InferInput("x", [4], "FP32")
        tensor.set_data_from_numpy(values)
        try:
            self.client.load_model(
                self._model,
                headers=self._headers,
                config=json.dumps(_CONFIG),
                files={"file:1/model.onnx": graph.model().SerializeToString()},
                client_timeout=_LOAD_S,
            )
            self._asked_s = time.time()
            answer = self.client.infer(self._model, [tensor], headers=self._headers, client_timeout=_LOAD_S)
            self._answered_s = time.time()
        except InferenceServerException as error:
            advice = "it needs the backend `onnxruntime`: use NVIDIA's image with it, or the embedded Triton"
            raise self._wrong(f"a model does not run: {error.message()}", advice) from error
        if not np.array_equal(answer.as_numpy("y"), 2 * values):
            raise self._wrong("a model's answer is wrong", "see its log, and use a version that the project names")
        return self._found(State.OK, "a model loads into the backend `onnxruntime` and runs")

    def _clock(self) -> Finding:
        """The time of the request just made: by its clock, and between which times it was by ours."""
        theirs_s = self._last_use_s()
        if not theirs_s:
            return self._found(State.WARNING, "its statistics do not show the request just made", "look at its log")
        return judge_skew(self._name, theirs_s - min(max(theirs_s, self._asked_s), self._answered_s))

    def _last_use_s(self) -> float:
        """When it was asked last, by its clock; it answers a request a little before it counts it."""
        give_up_s = time.monotonic() + _WAIT_S
        while True:
            answer = self.client.get_inference_statistics(self._model, headers=self._headers, client_timeout=_WAIT_S)
            last_s = float(answer.model_stats[0].last_inference / 1000)
            if last_s or time.monotonic() > give_up_s:
                return last_s
            time.sleep(0.02)

    def _memory(self) -> Finding:
        """Makes it map a page of shared memory."""
        name, size = f"lipsync-doctor-{secrets.token_hex(6)}", mmap.PAGESIZE
        path = Path("/dev/shm") / name
        advice = "both need one /dev/shm (containers: a shared volume or IPC namespace), and a newer Triton "
        advice += "--allow-client-shm=true; without it, mouths come as tensors, which costs more"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except OSError as error:
            return self._found(State.WARNING, f"no shared memory can be made: {error.strerror}", advice)
        try:
            os.ftruncate(descriptor, size)
            self.client.register_system_shared_memory(
                name, f"/{name}", size, headers=self._headers, client_timeout=_WAIT_S
            )
            self.client.unregister_system_shared_memory(name, headers=self._headers, client_timeout=_WAIT_S)
        except InferenceServerException as error:
            return self._found(State.WARNING, f"it cannot map shared memory: {error.message()}", advice)
        finally:
            os.close(descriptor)
            path.unlink()
        return self._found(State.OK, "it maps shared memory")


def judge_skew(name: str, ahead_s: float) -> Finding:
    """ahead_s: how far Triton's clock is ahead of ours, at least."""
    if abs(ahead_s) < SKEW_S:
        return Finding(name, State.OK, "its clock agrees with ours")
    found = f"its clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} ours"
    return Finding(name, State.WRONG, found, "run a time service on both machines: `timedatectl set-ntp true`")


def check_triton(endpoint: str, repository: Path, key: str | None = None) -> Iterator[Finding]:
    """What a Triton at host:port can do. key: what it asks for where it restricts a protocol."""
    examination = _Examination(endpoint, repository, {} if key is None else {KEY_HEADER: key})
    with contextlib.closing(examination.client):
        yield from examination.findings()
