"""The embedded `onnxruntime` backend against real ONNX Runtime, with Triton's side of the interface faked."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

MODEL_PY = Path(__file__).resolve().parents[2] / "deploy" / "backends" / "onnxruntime" / "model.py"

set_name = ctypes.pythonapi.PyCapsule_SetName
set_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


@dataclass
class Source:
    """What NumPy takes a capsule from."""

    capsule: Any

    def __dlpack__(self, **options: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class FakeTensor:
    """As in the wheel's stub, arrays pass through DLPack only."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    @classmethod
    def from_dlpack(cls, name: str, capsule: Any) -> FakeTensor:
        """As the stub does it, which has a word of its own for a capsule that was used."""
        tensor = cls(name, np.from_dlpack(Source(capsule)))
        set_name(capsule, b"used_dlpack")
        return tensor

    def name(self) -> str:
        return self._name

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


@dataclass
class FakeRequest:
    tensors: dict[str, np.ndarray]
    outputs: tuple[str, ...] = ("y",)

    def requested_output_names(self) -> list[str]:
        return list(self.outputs)


@dataclass
class FakeResponse:
    output_tensors: list[FakeTensor]
    error: Any = None

    def array(self, name: str) -> np.ndarray:
        return next(tensor._array for tensor in self.output_tensors if tensor.name() == name)


@dataclass
class FakeLogger:
    warnings: list[str] = field(default_factory=list)

    def log_warn(self, message: str) -> None:
        self.warnings.append(message)


class FakeModelException(Exception):
    pass


class FakeSession:
    """Counts the runs of a real session."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.runs: list[tuple[list[str], dict[str, np.ndarray]]] = []

    def run(self, names: list[str], feeds: dict[str, np.ndarray], options: Any) -> list[np.ndarray]:
        self.runs.append((names, feeds))
        outputs: list[np.ndarray] = self.session.run(names, feeds, options)
        return outputs


def by_name(request: FakeRequest, name: str) -> FakeTensor | None:
    return FakeTensor(name, request.tensors[name]) if name in request.tensors else None


@pytest.fixture(scope="module")
def backend() -> Any:
    fake = types.ModuleType("triton_python_backend_utils")
    fake.Tensor = FakeTensor  # type: ignore[attr-defined]
    fake.InferenceResponse = FakeResponse  # type: ignore[attr-defined]
    fake.TritonError = str  # type: ignore[attr-defined]
    fake.TritonModelException = FakeModelException  # type: ignore[attr-defined]
    fake.Logger = FakeLogger()  # type: ignore[attr-defined]
    fake.get_input_tensor_by_name = by_name  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("onnxruntime_backend_model", MODEL_PY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", fake)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def warnings(backend: Any) -> list[str]:
    seen: list[str] = backend.pb_utils.Logger.warnings
    seen.clear()
    return seen


def graph_model(batch: str | int = "n", width: str | int = 3) -> onnx.ModelProto:
    """y = 10 / x as INT32; z says where x is above 4."""
    shape: list[str | int | None] = [batch, width]
    nodes = [helper.make_node("Div", ["ten", "x"], ["y"]), helper.make_node("Greater", ["x", "four"], ["z"])]
    constants = [helper.make_tensor(n, TensorProto.INT32, [1], [v]) for n, v in (("ten", 10), ("four", 4))]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.INT32, shape),
        helper.make_tensor_value_info("z", TensorProto.BOOL, shape),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.INT32, shape)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def model_config(max_batch_size: int = 8, **more: Any) -> dict[str, Any]:
    dims = [3] if max_batch_size else [-1, 3]
    return {
        "max_batch_size": max_batch_size,
        "input": [{"name": "x", "data_type": "TYPE_INT32", "dims": dims}],
        "output": [
            {"name": "y", "data_type": "TYPE_INT32", "dims": dims},
            {"name": "z", "data_type": "TYPE_BOOL", "dims": dims},
        ],
        "parameters": {},
        **more,
    }


def parameters(**values: str) -> dict[str, dict[str, str]]:
    return {key.replace("__", "."): {"string_value": value} for key, value in values.items()}


def arguments(folder: Path, config: dict[str, Any], **more: str) -> dict[str, str]:
    return {
        "model_config": json.dumps(config),
        "model_repository": str(folder),
        "model_version": "1",
        "model_name": "m",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
        **more,
    }


def start(backend: Any, folder: Path, config: dict[str, Any], model: onnx.ModelProto | None = None, **more: str) -> Any:
    (folder / "1").mkdir(exist_ok=True)
    onnx.save(model or graph_model(), str(folder / "1" / "model.onnx"))
    instance = backend.TritonPythonModel()
    instance.initialize(arguments(folder, config, **more))
    instance.session = FakeSession(instance.session)
    return instance


def row(*values: int) -> np.ndarray:
    return np.array([values], np.int32)


@given(data=st.data())
@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_request_list_is_one_run_and_each_gets_its_own_rows(
    backend: Any, tmp_path: Path, data: st.DataObject
) -> None:
    model = start(backend, tmp_path, model_config())
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    wanted = [data.draw(st.sampled_from([("y",), ("z",), ("y", "z")])) for _ in sizes]
    rng = np.random.default_rng(sum(sizes))
    inputs = [rng.integers(1, 10, (size, 3), dtype=np.int32) for size in sizes]
    requests = [FakeRequest({"x": x}, outputs) for x, outputs in zip(inputs, wanted, strict=True)]
    responses = model.execute(requests)
    assert len(model.session.runs) == 1
    assert len(responses) == len(requests)
    for x, outputs, response in zip(inputs, wanted, responses, strict=True):
        assert response.error is None
        assert {tensor.name() for tensor in response.output_tensors} == set(outputs)
        if "y" in outputs:
            np.testing.assert_array_equal(response.array("y"), 10 // x)
        if "z" in outputs:
            np.testing.assert_array_equal(response.array("z"), x > 4)


def test_outputs_that_nobody_asked_for_are_not_fetched(backend: Any, tmp_path: Path) -> None:
    model = start(backend, tmp_path, model_config())
    model.execute([FakeRequest({"x": row(1, 2, 3)}), FakeRequest({"x": row(1, 2, 3)})])
    assert model.session.runs[0][0] == ["y"]


def test_single_request_reaches_the_session_uncopied(backend: Any, tmp_path: Path) -> None:
    model = start(backend, tmp_path, model_config())
    x = row(1, 2, 5)
    model.execute([FakeRequest({"x": x})])
    assert np.shares_memory(model.session.runs[0][1]["x"], x)


def test_model_without_batching_runs_request_by_request(backend: Any, tmp_path: Path) -> None:
    config = model_config(0)
    model = start(backend, tmp_path, config)
    responses = model.execute([FakeRequest({"x": row(1, 2, 5)}), FakeRequest({"x": row(10, 1, 1)})])
    assert len(model.session.runs) == 2
    np.testing.assert_array_equal(responses[1].array("y"), [[1, 10, 10]])


def test_failed_run_answers_every_request_and_the_next_run_works(backend: Any, tmp_path: Path) -> None:
    model = start(backend, tmp_path, model_config())
    responses = model.execute([FakeRequest({"x": row(1, 2, 3, 4)})] * 2)
    assert ["onnxruntime execute failure" in response.error for response in responses] == [True, True]
    assert [response.output_tensors for response in responses] == [[], []]
    assert model.execute([FakeRequest({"x": row(1, 2, 5)})])[0].error is None


def test_output_without_the_batch_s_rows_is_an_error(backend: Any, tmp_path: Path) -> None:
    model = start(backend, tmp_path, model_config())
    model.session.run = lambda names, feeds, options: [np.zeros((1, 3), np.int32)]
    responses = model.execute([FakeRequest({"x": row(1, 2, 3)})] * 2)
    assert all("has 1 rows for a batch of 2" in response.error for response in responses)


def test_optional_input_in_some_requests_only_is_an_error(backend: Any, tmp_path: Path) -> None:
    model = start(backend, tmp_path, model_config())
    responses = model.execute([FakeRequest({"x": row(1, 2, 3)}), FakeRequest({})])
    assert all("optional input 'x'" in response.error for response in responses)


@pytest.mark.parametrize(
    ("level", "expected"),
    [(-1, "ORT_ENABLE_BASIC"), (0, "ORT_ENABLE_ALL"), (1, "ORT_ENABLE_EXTENDED"), (2, "ORT_DISABLE_ALL")],
)
def test_graph_level(backend: Any, level: int, expected: str) -> None:
    options = backend.session_options({"optimization": {"graph": {"level": level}}})
    assert options.graph_optimization_level == getattr(onnxruntime.GraphOptimizationLevel, expected)


def test_session_options_come_from_the_parameters(backend: Any) -> None:
    entry = "session.use_device_allocator_for_initializers"
    values = parameters(
        intra_op_thread_count="3",
        inter_op_thread_count="2",
        execution_mode="1",
        enable_mem_arena="0",
        enable_mem_pattern="false",
        session__use_device_allocator_for_initializers="1",
    )
    options = backend.session_options({"parameters": values})
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 2
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
    assert options.enable_cpu_mem_arena is False
    assert options.enable_mem_pattern is False
    assert options.get_session_config_entry(entry) == "1"


def test_session_options_without_parameters_are_onnxruntime_s(backend: Any) -> None:
    options, plain = backend.session_options({}), onnxruntime.SessionOptions()
    for name in ("intra_op_num_threads", "inter_op_num_threads", "execution_mode", "enable_cpu_mem_arena"):
        assert getattr(options, name) == getattr(plain, name)


def test_arena_shrinkage_is_an_option_of_the_run(backend: Any, tmp_path: Path) -> None:
    key = "memory.enable_memory_arena_shrinkage"
    config = model_config(parameters=parameters(memory__enable_memory_arena_shrinkage="cpu:0"))
    model = start(backend, tmp_path, config)
    assert model.run_options.get_run_config_entry(key) == "cpu:0"
    assert model.execute([FakeRequest({"x": row(1, 2, 5)})])[0].error is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"intra_op_thread_count": "two"}, "intra_op_thread_count is 'two'"),
        ({"execution_mode": "2"}, "execution_mode is 2"),
        ({"enable_mem_arena": "maybe"}, "enable_mem_arena is 'maybe'"),
    ],
)
def test_bad_parameters_are_named(backend: Any, tmp_path: Path, values: dict[str, str], message: str) -> None:
    with pytest.raises(FakeModelException, match=message):
        start(backend, tmp_path, model_config(parameters=parameters(**values)))


def test_ignored_parameters_are_warned_of(backend: Any, tmp_path: Path, warnings: list[str]) -> None:
    values = parameters(
        session__intra_op__allow_spinning="0", intra_op_thread_count="1", lipsync_memory_bytes="836000000"
    )
    start(backend, tmp_path, model_config(parameters=values))
    assert len(warnings) == 1
    assert "session.intra_op.allow_spinning" in warnings[0]
    assert "intra_op_thread_count" not in warnings[0]
    assert "lipsync" not in warnings[0], "a note for the compositor"


def test_cpu_instance_runs_on_the_cpu_even_where_cuda_is_there(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(backend.onnxruntime, "get_available_providers", lambda: available)
    assert backend.providers({}, "CPU", 0) == ["CPUExecutionProvider"]


def test_gpu_instance_gets_its_device_and_the_cuda_parameters(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(backend.onnxruntime, "get_available_providers", lambda: available)
    accelerator = {"name": "cuda", "parameters": {"use_tf32": "0", "gpu_mem_limit": "7"}}
    config = {
        "parameters": parameters(cudnn_conv_algo_search="1", gpu_mem_limit="1000", arena_extend_strategy="1"),
        "optimization": {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}},
    }
    assert backend.providers(config, "GPU", 3) == [
        (
            "CUDAExecutionProvider",
            {
                "use_tf32": "0",
                "cudnn_conv_algo_search": "HEURISTIC",
                "gpu_mem_limit": "1000",
                "arena_extend_strategy": "kSameAsRequested",
                "do_copy_in_default_stream": "1",
                "device_id": "3",
            },
        ),
        "CPUExecutionProvider",
    ]


def test_cuda_choice_out_of_range_is_named(backend: Any) -> None:
    with pytest.raises(FakeModelException, match="cudnn_conv_algo_search is 3"):
        backend.cuda_options({"parameters": parameters(cudnn_conv_algo_search="3")}, 0)


def test_gpu_instance_without_cuda_says_so(backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(FakeModelException, match=r"KIND_GPU on device 1.*KIND_CPU"):
        start(backend, tmp_path, model_config(), model_instance_kind="GPU", model_instance_device_id="1")


def test_accelerators(backend: Any, warnings: list[str]) -> None:
    def config(kind: str, name: str) -> dict[str, Any]:
        return {"optimization": {"execution_accelerators": {f"{kind}_execution_accelerator": [{"name": name}]}}}

    assert backend.providers(config("cpu", "openvino"), "CPU", 0) == ["CPUExecutionProvider"]
    assert len(warnings) == 1
    assert "openvino" in warnings[0]
    # A GPU accelerator concerns GPU instances only.
    assert backend.providers(config("gpu", "nonsense"), "CPU", 0) == ["CPUExecutionProvider"]
    with pytest.raises(FakeModelException, match="'nonsense'"):
        backend.providers(config("cpu", "nonsense"), "CPU", 0)


def test_model_file_by_default_filename_or_folder(backend: Any, tmp_path: Path) -> None:
    (tmp_path / "1" / "folder").mkdir(parents=True)
    for name in ("other.onnx", "folder/model.onnx"):
        (tmp_path / "1" / name).write_bytes(b"")
    args = arguments(tmp_path, {})
    assert backend.model_path(args, {"default_model_filename": "other.onnx"}) == tmp_path / "1" / "other.onnx"
    assert backend.model_path(args, {"default_model_filename": "folder"}) == tmp_path / "1" / "folder" / "model.onnx"
    with pytest.raises(FakeModelException, match=r"unable to find .*1/model.onnx"):
        backend.model_path(args, {})


def test_damaged_model_is_named(backend: Any, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(FakeModelException, match=r"onnxruntime does not load .*model\.onnx"):
        backend.TritonPythonModel().initialize(arguments(tmp_path, model_config()))


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        (lambda c: c["input"][0].update(name="w"), graph_model(), "no input 'w'"),
        (lambda c: c["input"][0].update(data_type="TYPE_FP32"), graph_model(), "'x' is TYPE_FP32"),
        (lambda c: c["output"][0].update(data_type="TYPE_STRING"), graph_model(), "'y' is TYPE_STRING"),
        (lambda c: c["output"][0].update(dims=[4]), graph_model(), "'y' is .-1, 4. in config"),
        (lambda c: c["input"][0].update(dims=[3, 1]), graph_model(), "'x' is .-1, 3, 1. in config"),
        (lambda c: c["input"].clear(), graph_model(), "inputs x are missing"),
        (lambda c: None, graph_model(batch=8), "the batch must be variable"),
        # The C++ backend, too, wants outputs exactly equal.
        (lambda c: None, graph_model(width="w"), "output 'y' is .-1, 3. in config.pbtxt, .-1, -1. in the graph"),
    ],
)
def test_config_that_does_not_fit_the_graph_is_refused(
    backend: Any, tmp_path: Path, change: Any, model: onnx.ModelProto, message: str
) -> None:
    config = model_config()
    change(config)
    with pytest.raises(FakeModelException, match=message):
        start(backend, tmp_path, config, model)


def test_external_data_beside_the_model_is_found(backend: Any, tmp_path: Path) -> None:
    model = graph_model()
    (tmp_path / "1").mkdir()
    onnx.save(
        model,
        str(tmp_path / "1" / "model.onnx"),
        save_as_external_data=True,
        location="constants.bin",
        size_threshold=0,
        convert_attribute=False,
    )
    instance = backend.TritonPythonModel()
    instance.initialize(arguments(tmp_path, model_config()))
    np.testing.assert_array_equal(instance.execute([FakeRequest({"x": row(1, 2, 5)})])[0].array("y"), [[10, 5, 2]])
    instance.finalize()
