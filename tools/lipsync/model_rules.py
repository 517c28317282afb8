"""The rules an uploaded ONNX must keep: bytes come in, an UploadedModel or a refusal goes out.

It parses a stranger's bytes: only the child process of `model_probe` calls `examine`. No file is opened and nothing is
run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from lipsync.model_interface import (
    MAX_IR_VERSION,
    MAX_OPSET,
    MIN_OPSET,
    TENSOR_NAME_PATTERN,
    Batch,
    Interface,
    TensorSpec,
    UploadedModel,
    shape_text,
)

_DEFAULT_DOMAINS = ("", "ai.onnx")
_COPY_AGAIN = "copy it again, or export the model to ONNX"
_EXPORT_AGAIN = "export it again with opset 17"
_DYNAMIC_AXES = "export with dynamic_axes naming axis 0 of every input and output"


class Rules:
    """The rules for one file; `path` is only how messages call it."""

    def __init__(self, interface: Interface, path: str) -> None:
        self._interface = interface
        self._path = path

    def examine(self, data: bytes, names: Mapping[str, str]) -> tuple[UploadedModel, onnx.ModelProto]:
        """Checks everything that can be told without running the model.

        `names` maps roles (visual, audio, output; mel, features) to tensor names and settles what shapes leave open.
        Raises InvalidInput, one line, on the first rule that is broken.
        """
        model = self._parsed(data)
        for graph in graphs(model):
            self._check_self_contained(graph)
        opset = self._opset(model)
        self._check_well_formed(model)
        inputs, output = self._matched(model.graph, names)
        found = UploadedModel(
            inputs=tuple(value.name for value in inputs),
            output=output.name,
            opset=opset,
            ir=model.ir_version,
            batch=self._batch([*inputs, output]),
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
        )
        return found, model

    def _parsed(self, data: bytes) -> onnx.ModelProto:
        if not data:
            raise self._refusal("the file is empty", "copy it again")
        try:
            model = onnx.load_model_from_string(data)
        except DecodeError:
            raise self._refusal("not an ONNX file, or cut short", _COPY_AGAIN) from None
        if not model.HasField("graph") or not model.graph.node:
            raise self._refusal("it holds no graph", _COPY_AGAIN)
        if model.functions:
            raise self._refusal("it defines local functions", "export with plain operators (opset 17)")
        if model.training_info:
            raise self._refusal("it holds training information", "export for inference")
        return model

    def _check_self_contained(self, graph: onnx.GraphProto) -> None:
        for tensor in _tensors(graph):
            if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
                fault = f"the tensor {tensor.name!r} lies in another file (external data)"
                raise self._refusal(fault, "save the model as one file with its weights inside")
        for node in graph.node:
            if node.domain not in _DEFAULT_DOMAINS:
                fault = f"the node {node.name!r} needs the operator {node.domain}.{node.op_type}"
                raise self._refusal(fault, "export with operators of the default ONNX domain only")

    def _opset(self, model: onnx.ModelProto) -> int:
        if model.ir_version > MAX_IR_VERSION:
            fault = f"IR version {model.ir_version} is newer than {MAX_IR_VERSION}, the last that is served"
            raise self._refusal(fault, _EXPORT_AGAIN)
        opsets = {entry.version for entry in model.opset_import if entry.domain in _DEFAULT_DOMAINS}
        if len(opsets) != 1:
            raise self._refusal("it does not say which opset it uses", _EXPORT_AGAIN)
        opset = opsets.pop()
        if not MIN_OPSET <= opset <= MAX_OPSET:
            raise self._refusal(f"opset {opset} is outside {MIN_OPSET} to {MAX_OPSET}", _EXPORT_AGAIN)
        return opset

    def _check_well_formed(self, model: onnx.ModelProto) -> None:
        try:
            onnx.checker.check_model(model)
        except (onnx.checker.ValidationError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            raise self._refusal(f"it is not a valid ONNX model ({reason})", _EXPORT_AGAIN) from None

    def _matched(
        self, graph: onnx.GraphProto, names: Mapping[str, str]
    ) -> tuple[list[onnx.ValueInfoProto], onnx.ValueInfoProto]:
        unknown = names.keys() - set(self._interface.roles)
        if unknown:
            raise self._refusal(f"there is no role {min(unknown)!r}", f"name {', '.join(self._interface.roles)}")
        stored = {tensor.name for tensor in graph.initializer}
        stored |= {tensor.values.name for tensor in graph.sparse_initializer}
        fed = [value for value in graph.input if value.name not in stored]
        specs = self._interface.inputs
        if len(fed) != len(specs):
            listed = ", ".join(f"{value.name} {shape_text(_dims(value))}" for value in fed) or "none"
            raise self._refusal(f"it has {len(fed)} inputs ({listed}) instead of {len(specs)}", self._expected())
        inputs = [self._tensor(spec, "input", fed, names.get(spec.role)) for spec in specs]
        answer = self._interface.output
        output = self._tensor(answer, "output", graph.output, names.get(answer.role))
        chosen = [value.name for value in (*inputs, output)]
        if len(set(chosen)) != len(chosen):
            raise self._refusal(f"the tensor {chosen[0]!r} fits several roles", self._name_them())
        return inputs, output

    def _tensor(
        self, spec: TensorSpec, side: str, values: Sequence[onnx.ValueInfoProto], name: str | None
    ) -> onnx.ValueInfoProto:
        """The one value that `name` names, or whose shape is `spec`'s, or whose shape may turn out to be."""
        if name is not None:
            values = [value for value in values if value.name == name]
            if not values:
                raise self._refusal(f"it has no {side} {name!r} for {spec.role}", f"name one of its {side}s")
        exact = [value for value in values if _dims(value)[1:] == spec.shape]
        fitting = exact or [value for value in values if _may_be(value, spec)]
        if len(fitting) > 1:
            listed = ", ".join(value.name for value in fitting)
            raise self._refusal(f"several {side}s fit {spec.role} {spec.text}: {listed}", self._name_them())
        if not fitting:
            listed = ", ".join(f"{value.name} {shape_text(_dims(value))}" for value in values) or "none"
            raise self._refusal(f"no {side} has the shape {spec.text} of {spec.role}, found {listed}", self._expected())
        value = fitting[0]
        element = value.type.tensor_type.elem_type
        if element != TensorProto.FLOAT:
            known = TensorProto.DataType.Name(element) if element in TensorProto.DataType.values() else str(element)
            fault = f"the {side} {value.name} is {known}, not float32"
            raise self._refusal(fault, "export with float32 inputs and outputs")
        if not re.fullmatch(TENSOR_NAME_PATTERN, value.name):
            fault = f"the {side} name {value.name!r} has other characters than letters, digits and _.:/-"
            raise self._refusal(fault, "export with plain input_names and output_names")
        return value

    def _batch(self, values: Sequence[onnx.ValueInfoProto]) -> Batch:
        sizes = {_dims(value)[0] for value in values if _dims(value)}
        fixed = {size for size in sizes if isinstance(size, int)}
        if fixed - {1}:
            raise self._refusal(f"its batch size is fixed at {max(fixed)}", _DYNAMIC_AXES)
        return "fixed" if fixed else "dynamic"

    def _name_them(self) -> str:
        return "say which tensor is " + ", which is ".join(self._interface.roles)

    def _expected(self) -> str:
        return f"export {self._interface.text}"

    def _refusal(self, fault: str, remedy: str) -> Exception:
        return self._interface.refusal(self._path, fault, remedy)


def make_dynamic(model: onnx.ModelProto, found: UploadedModel, interface: Interface) -> None:
    """Gives `model` a symbolic batch axis in place: its interface states the expected shapes, and shapes noted inside
    are dropped (a fixed export noted batch 1 there). Weights and nodes stay as they are."""
    expected = dict(zip((*found.inputs, found.output), (*interface.inputs, interface.output), strict=True))
    for value in (*model.graph.input, *model.graph.output):
        if value.name in expected:
            shape: list[int | str | None] = ["batch", *expected[value.name].shape]
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    for graph in graphs(model):
        del graph.value_info[:]


def graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph at any depth, without recursion."""
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting.extend([attribute.g] if attribute.HasField("g") else [])
                waiting.extend(attribute.graphs)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in one graph, subgraphs aside: dense and sparse, in initializers and in attributes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _dims(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """The dimensions: a number where fixed, a name or ? where not; empty for what is no tensor."""
    return tuple(
        dim.dim_value if dim.dim_value > 0 else (dim.dim_param or "?") for dim in value.type.tensor_type.shape.dim
    )


def _may_be(value: onnx.ValueInfoProto, spec: TensorSpec) -> bool:
    """Whether unnamed dimensions could be `spec`'s: exporters leave those of outputs behind a Resize open. The probe
    decides."""
    dims = _dims(value)
    return len(dims) == len(spec.shape) + 1 and all(
        isinstance(found, str) or found == wanted for found, wanted in zip(dims[1:], spec.shape, strict=True)
    )
