"""GPUs that the settings name and a machine does not have."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.settings import Settings
from lipsync.tritonserver import EmbeddedTriton

from ..conftest import ServiceThread, Stack, connect

pytestmark = pytest.mark.triton


def test_a_gpu_that_triton_does_not_have_is_told_by_its_setting(stack: Stack) -> None:
    """By a Triton of the test's own, which has nothing loaded: what is loaded already needs no GPU to be named."""
    with EmbeddedTriton(stack.repository) as triton:
        values = stack.service.settings.model_dump()
        values["triton"].update(endpoints=triton.grpc, gpus=[63])
        service = ServiceThread(Settings.model_validate(values))
        service.start()
        try:
            for stub in connect(service.address):
                features = np.zeros((1, 32, 16, 16), np.float32).tobytes()
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Composite(pb.CompositeRequest(tenant="plain", features=features), timeout=60)
                words = f"the setting triton.gpus names GPU 63, which {triton.grpc} does not have: name those it has"
                assert caught.value.details().startswith(words)
        finally:
            service.stop()
