"""Triton's `onnxruntime` backend in Python, for the embedded server: in come request lists, out go their responses.

Tensors pass as DLPack only: the wheel's stub was built for NumPy 1, and under NumPy 2 its `as_numpy` repeats the first
element and its `Tensor(name, array)` sends no bytes.

Takes from config.pbtxt what the C++ backend takes (its README and src/onnxruntime.cc), so that one config serves both.
For embedded use only: production runs the C++ backend and never mounts this folder.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

DATA_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_UINT16": "tensor(uint16)",
    "TYPE_UINT32": "tensor(uint32)",
    "TYPE_UINT64": "tensor(uint64)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
}
# Every other level, 0 included, means all optimizations.
GRAPH_LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
# Top-level parameters for CUDA: what each value means (None: taken as it is), and the default.
CUDA_PARAMETERS: dict[str, tuple[list[str] | None, str]] = {
    "cudnn_conv_algo_search": (["EXHAUSTIVE", "HEURISTIC", "DEFAULT"], "EXHAUSTIVE"),
    "gpu_mem_limit": (None, str(2**64 - 1)),
    "arena_extend_strategy": (["kNextPowerOfTwo", "kSameAsRequested"], "kNextPowerOfTwo"),
    "do_copy_in_default_stream": (None, "1"),
}
ARENA_SHRINKAGE = "memory.enable_memory_arena_shrinkage"
SESSION_ENTRY = "session.use_device_allocator_for_initializers"
HONOURED = {
    "execution_mode",
    "intra_op_thread_count",
    "inter_op_thread_count",
    "enable_mem_arena",
    "enable_mem_pattern",
    "share_session_between_instances",
    ARENA_SHRINKAGE,
    SESSION_ENTRY,
    *CUDA_PARAMETERS,
}
NOTES = "lipsync_"
"""Parameters of this prefix are for the compositor, and say nothing to a backend."""
_USED = b"used_dltensor"
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Parameters:
    """The `parameters` of a config.pbtxt, read as the C++ backend reads them."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._values = {key: entry["string_value"] for key, entry in config.get("parameters", {}).items()}
        self.unknown = sorted(key for key in self._values.keys() - HONOURED if not key.startswith(NOTES))

    def text(self, key: str) -> str | None:
        return self._values.get(key)

    def integer(self, key: str, default: int = 0) -> int:
        value = self._values.get(key)
        if value is None:
            return default
        try:
            return int(value)
        except ValueError:
            raise pb_utils.TritonModelException(f"parameter {key} is {value!r}: it must be a whole number") from None

    def flag(self, key: str) -> bool | None:
        value = self._values.get(key)
        if value is None:
            return None
        if value.lower() not in ("0", "1", "false", "true"):
            raise pb_utils.TritonModelException(f"parameter {key} is {value!r}: it must be 0, 1, true or false")
        return value.lower() in ("1", "true")


def session_options(config: dict[str, Any]) -> onnxruntime.SessionOptions:
    """ONNX Runtime's options for a parsed config.pbtxt. Raises TritonModelException for a value out of range."""
    parameters = Parameters(config)
    options = onnxruntime.SessionOptions()
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = GRAPH_LEVELS.get(level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    mode = parameters.integer("execution_mode")
    if mode not in (0, 1):
        raise pb_utils.TritonModelException(f"parameter execution_mode is {mode}: it must be 0 or 1")
    modes = (onnxruntime.ExecutionMode.ORT_SEQUENTIAL, onnxruntime.ExecutionMode.ORT_PARALLEL)
    options.execution_mode = modes[mode]
    options.intra_op_num_threads = max(0, parameters.integer("intra_op_thread_count"))
    options.inter_op_num_threads = max(0, parameters.integer("inter_op_thread_count"))
    if (arena := parameters.flag("enable_mem_arena")) is not None:
        options.enable_cpu_mem_arena = arena
    if (pattern := parameters.flag("enable_mem_pattern")) is not None:
        options.enable_mem_pattern = pattern
    if (entry := parameters.text(SESSION_ENTRY)) is not None:
        options.add_session_config_entry(SESSION_ENTRY, entry)
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        options.register_custom_ops_library(library)
    return options


def run_options(config: dict[str, Any]) -> onnxruntime.RunOptions:
    """Options of every run: the arena is given back after it where the config says so (`cpu:0`)."""
    options = onnxruntime.RunOptions()
    if (devices := Parameters(config).text(ARENA_SHRINKAGE)) is not None:
        options.add_run_config_entry(ARENA_SHRINKAGE, devices)
    return options


def providers(config: dict[str, Any], kind: str, device_id: int) -> list[Any]:
    """Execution providers, in order, for an instance of `kind` (CPU or GPU, as Triton resolved it) on `device_id`.

    Raises TritonModelException for a GPU instance where this onnxruntime has no CUDA, and for unknown accelerators.
    """
    available = onnxruntime.get_available_providers()
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    chosen: list[Any] = []
    if kind == "GPU":
        if "CUDAExecutionProvider" not in available:
            raise pb_utils.TritonModelException(
                f"the instance group asks for KIND_GPU on device {device_id}, but onnxruntime {onnxruntime.__version__}"
                f" has only {', '.join(available)}: install onnxruntime-gpu, or set KIND_CPU"
            )
        chosen.append(("CUDAExecutionProvider", cuda_options(config, device_id)))
        known, wanted = ("tensorrt", "cuda"), accelerators.get("gpu_execution_accelerator", [])
    else:
        known, wanted = ("openvino",), []
    wanted = [*wanted, *accelerators.get("cpu_execution_accelerator", [])]
    for accelerator in wanted:
        name = accelerator["name"]
        if name not in (*known, "openvino"):
            raise pb_utils.TritonModelException(f"unknown execution accelerator {name!r} is requested")
        if name != "cuda":
            pb_utils.Logger.log_warn(f"the embedded backend goes without the execution accelerator {name!r}")
    return [*chosen, "CPUExecutionProvider"]


def cuda_options(config: dict[str, Any], device_id: int) -> dict[str, str]:
    """Options of the CUDA provider. As in the C++ backend, the keys of `CUDA_PARAMETERS` count at top level only."""
    parameters = Parameters(config)
    options: dict[str, str] = {}
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    for accelerator in accelerators.get("gpu_execution_accelerator", []):
        if accelerator["name"] == "cuda":
            options.update(accelerator.get("parameters", {}))
    for key, (meanings, default) in CUDA_PARAMETERS.items():
        if parameters.text(key) is None:
            options[key] = default
        elif meanings is None:
            options[key] = parameters.text(key) or default
        else:
            index = parameters.integer(key)
            if not 0 <= index < len(meanings):
                raise pb_utils.TritonModelException(f"parameter {key} is {index}: it must be 0 to {len(meanings) - 1}")
            options[key] = meanings[index]
    options["device_id"] = str(device_id)
    return options


def model_path(args: dict[str, str], config: dict[str, Any]) -> Path:
    """The ONNX file of this version: `default_model_filename`, else model.onnx; inside it where that is a folder."""
    path = Path(args["model_repository"], args["model_version"], config.get("default_model_filename") or "model.onnx")
    if path.is_dir():
        path /= "model.onnx"
    if not path.is_file():
        raise pb_utils.TritonModelException(f"unable to find {path} for model {args['model_name']}")
    return path


def check_tensors(what: str, entries: list[dict[str, Any]], nodes: list[Any], max_batch_size: int) -> None:
    """Raises TritonModelException unless the config's inputs or outputs fit the graph's.

    As in the C++ backend the graph may leave open what the config fixes for inputs, while outputs must be equal.
    """
    graph = {node.name: node for node in nodes}
    for entry in entries:
        name, dims = entry["name"], [int(d) for d in entry.get("reshape", {}).get("shape", entry["dims"])]
        node = graph.get(name)
        if node is None:
            raise pb_utils.TritonModelException(f"the graph has no {what} {name!r}; it has {', '.join(graph)}")
        data_type = entry["data_type"]
        if DATA_TYPES.get(data_type) != node.type:
            raise pb_utils.TritonModelException(f"{what} {name!r} is {data_type}, but {node.type} in the graph")
        actual = [d if isinstance(d, int) else -1 for d in node.shape]
        expected = [-1, *dims] if max_batch_size > 0 else dims
        if max_batch_size > 0 and actual[:1] != [-1]:
            raise pb_utils.TritonModelException(f"{what} {name!r} is {actual} in the graph: the batch must be variable")
        open_dims = () if what == "output" else (-1,)
        same_rank = len(actual) == len(expected)
        if not same_rank or any(a != e and a not in open_dims for a, e in zip(actual, expected, strict=True)):
            raise pb_utils.TritonModelException(f"{what} {name!r} is {expected} in config.pbtxt, {actual} in the graph")


class TritonPythonModel:
    """One model instance: one ONNX Runtime session in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = Parameters(config)
        if parameters.unknown:
            ignored = ", ".join(parameters.unknown)
            pb_utils.Logger.log_warn(f"{args['model_name']}: the onnxruntime backend ignores the parameters {ignored}")
        if parameters.flag("share_session_between_instances"):
            pb_utils.Logger.log_warn(f"{args['model_name']}: embedded instances are processes and share no session")
        wanted = providers(config, args["model_instance_kind"], int(args["model_instance_device_id"]))
        path, options = model_path(args, config), session_options(config)
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        except Exception as fault:
            raise pb_utils.TritonModelException(f"onnxruntime does not load {path}: {fault}") from fault
        if len(wanted) > 1 and "CUDAExecutionProvider" not in self.session.get_providers():
            raise pb_utils.TritonModelException(f"{path}: CUDA could not be started; see the server's log")
        self.max_batch_size = int(config.get("max_batch_size", 0))
        self.run_options = run_options(config)
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]
        check_tensors("input", config["input"], self.session.get_inputs(), self.max_batch_size)
        check_tensors("output", config["output"], self.session.get_outputs(), self.max_batch_size)
        if missing := sorted({node.name for node in self.session.get_inputs()} - set(self.inputs)):
            raise pb_utils.TritonModelException(f"the graph's inputs {', '.join(missing)} are missing in config.pbtxt")

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request; a batching model runs once for the whole list."""
        groups = [requests] if self.max_batch_size > 0 else [[request] for request in requests]
        return [response for group in groups for response in self._respond(group)]

    def finalize(self) -> None:
        del self.session

    def _respond(self, requests: list[Any]) -> list[Any]:
        try:
            return self._run(requests)
        except Exception as fault:
            # One bad run must not end the process, with it the model, and with that every other session of the tenant.
            error = pb_utils.TritonError(f"onnxruntime execute failure: {fault}")
            return [pb_utils.InferenceResponse(output_tensors=[], error=error) for _ in requests]

    def _run(self, requests: list[Any]) -> list[Any]:
        feeds, sizes = self._gather(requests)
        wanted = [set(request.requested_output_names()) for request in requests]
        names = [name for name in self.outputs if any(name in asked for asked in wanted)]
        values = dict(zip(names, self.session.run(names, feeds, self.run_options), strict=True))
        if len(requests) == 1:
            return [self._response(values, wanted[0])]
        for name, value in values.items():
            if value.shape[0] != sum(sizes):
                raise ValueError(f"output {name!r} has {value.shape[0]} rows for a batch of {sum(sizes)}")
        responses, start = [], 0
        for asked, size in zip(wanted, sizes, strict=True):
            part = {name: value[start : start + size] for name, value in values.items()}
            responses.append(self._response(part, asked))
            start += size
        return responses

    def _gather(self, requests: list[Any]) -> tuple[dict[str, np.ndarray], list[int]]:
        """Feeds of the one run, and each request's rows in it. A single request's tensors are passed on uncopied."""
        feeds, sizes = {}, [1] * len(requests)
        for name in self.inputs:
            tensors = [pb_utils.get_input_tensor_by_name(request, name) for request in requests]
            present = [np.from_dlpack(tensor) for tensor in tensors if tensor is not None]
            if not present:
                continue
            if len(present) != len(requests):
                raise ValueError(f"optional input {name!r} is in some requests of the batch and not in others")
            feeds[name] = present[0] if len(present) == 1 else np.concatenate(present)
            if self.max_batch_size > 0:
                sizes = [len(value) for value in present]
        return feeds, sizes

    @staticmethod
    def _response(values: dict[str, np.ndarray], asked: set[str]) -> Any:
        tensors = [_tensor(name, value) for name, value in values.items() if name in asked]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _tensor(name: str, value: np.ndarray) -> Any:
    capsule = value.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # The stub has its own word for a capsule that was used, at which NumPy would log a traceback for each tensor.
    _rename(capsule, _USED)
    return tensor
