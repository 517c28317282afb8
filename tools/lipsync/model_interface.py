"""What an uploaded model must look like from outside, and what is known of one that does. Plain data; no onnx here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from compositor.errors import InvalidInput

# Production's Triton 24.10 carries ONNX Runtime 1.19: opsets up to 21, IR versions up to 10. Below 11, Resize differs.
MIN_OPSET = 11
MAX_OPSET = 21
MAX_IR_VERSION = 10
# 49 MB is the field's full size; protobuf itself ends at 2 GB.
DEFAULT_LIMIT_BYTES = 1_500_000_000
# Tensor names end up in config.pbtxt and in requests.
TENSOR_NAME_PATTERN = r"^[A-Za-z0-9_.:/\-]{1,128}$"

Kind = Literal["avatar", "encoder"]
Batch = Literal["dynamic", "fixed"]


@dataclass(frozen=True)
class TensorSpec:
    """One float32 tensor of an interface: its role, its shape without the batch axis, and the values it usually has."""

    role: str
    shape: tuple[int, ...]
    low: float
    high: float

    @property
    def text(self) -> str:
        """The shape as messages show it, such as [n,6,320,320]."""
        return shape_text(("n", *self.shape))


@dataclass(frozen=True)
class Interface:
    """The tensors an uploaded model of one kind has. `bounds` are the output values beyond which the model is wrong."""

    kind: Kind
    title: str
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    bounds: tuple[float, float] | None

    @property
    def roles(self) -> tuple[str, ...]:
        return (*(spec.role for spec in self.inputs), self.output.role)

    @property
    def text(self) -> str:
        """Both sides with their roles, for remedies."""
        inputs = " and ".join(f"{spec.role} {spec.text}" for spec in self.inputs)
        return f"{inputs} -> {self.output.role} {self.output.text}, all float32"

    def refusal(self, path: str, fault: str, remedy: str) -> InvalidInput:
        """The one line that every refusal of a model is: what: file, fault; remedy."""
        return InvalidInput(one_line(f"{self.title}: {path}, {fault}; {remedy}"), field="model")


AVATAR = Interface(
    kind="avatar",
    title="avatar model",
    inputs=(TensorSpec("visual", (6, 320, 320), 0.0, 1.0), TensorSpec("audio", (32, 16, 16), -1.0, 1.0)),
    output=TensorSpec("output", (3, 320, 320), 0.0, 1.0),
    bounds=(-0.5, 1.5),
)
ENCODER = Interface(
    kind="encoder",
    title="audio encoder",
    inputs=(TensorSpec("mel", (1, 80, 16), -4.0, 4.0),),
    output=TensorSpec("features", (512,), 0.0, 1.0),
    bounds=None,
)
INTERFACES: Mapping[str, Interface] = {interface.kind: interface for interface in (AVATAR, ENCODER)}


@dataclass(frozen=True)
class UploadedModel:
    """What inspection found: tensor names in the interface's order, versions, and the digest that ties it to the
    file."""

    inputs: tuple[str, ...]
    output: str
    opset: int
    ir: int
    batch: Batch
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class AvatarModel(UploadedModel):
    """An uploaded avatar model: visual [n,6,320,320] and audio [n,32,16,16] -> output [n,3,320,320]."""

    @property
    def visual(self) -> str:
        return self.inputs[0]

    @property
    def audio(self) -> str:
        return self.inputs[1]


@dataclass(frozen=True)
class EncoderModel(UploadedModel):
    """An uploaded audio encoder: mel [n,1,80,16] -> features [n,512]."""

    @property
    def mel(self) -> str:
        return self.inputs[0]

    @property
    def features(self) -> str:
        return self.output


def shape_text(dims: tuple[int | str, ...]) -> str:
    return "[" + ",".join(str(dim) for dim in dims) + "]"


def one_line(text: str, length: int = 600) -> str:
    """`text` as one printable line of at most `length` characters: parts of it may come from a stranger's file."""
    flat = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return flat if len(flat) <= length else flat[: length - 3] + "..."
