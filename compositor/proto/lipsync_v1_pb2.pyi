from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Speech(_message.Message):
    __slots__ = ("data", "encoding", "sample_rate", "channels")
    class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ENCODING_UNSPECIFIED: _ClassVar[Speech.Encoding]
        PCM16: _ClassVar[Speech.Encoding]
        FLOAT32: _ClassVar[Speech.Encoding]
        WAV: _ClassVar[Speech.Encoding]
    ENCODING_UNSPECIFIED: Speech.Encoding
    PCM16: Speech.Encoding
    FLOAT32: Speech.Encoding
    WAV: Speech.Encoding
    DATA_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    encoding: Speech.Encoding
    sample_rate: int
    channels: int
    def __init__(self, data: _Optional[bytes] = ..., encoding: _Optional[_Union[Speech.Encoding, str]] = ..., sample_rate: _Optional[int] = ..., channels: _Optional[int] = ...) -> None: ...

class FrameNumbers(_message.Message):
    __slots__ = ("numbers",)
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, numbers: _Optional[_Iterable[int]] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("format", "quality")
    class Format(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FORMAT_UNSPECIFIED: _ClassVar[Output.Format]
        JPEG: _ClassVar[Output.Format]
        BGR24: _ClassVar[Output.Format]
    FORMAT_UNSPECIFIED: Output.Format
    JPEG: Output.Format
    BGR24: Output.Format
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    format: Output.Format
    quality: int
    def __init__(self, format: _Optional[_Union[Output.Format, str]] = ..., quality: _Optional[int] = ...) -> None: ...

class CompositeRequest(_message.Message):
    __slots__ = ("tenant", "numbers", "start", "features", "speech", "visual_frames", "output")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SPEECH_FIELD_NUMBER: _ClassVar[int]
    VISUAL_FRAMES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    numbers: FrameNumbers
    start: int
    features: bytes
    speech: Speech
    visual_frames: bytes
    output: Output
    def __init__(self, tenant: _Optional[str] = ..., numbers: _Optional[_Union[FrameNumbers, _Mapping]] = ..., start: _Optional[int] = ..., features: _Optional[bytes] = ..., speech: _Optional[_Union[Speech, _Mapping]] = ..., visual_frames: _Optional[bytes] = ..., output: _Optional[_Union[Output, _Mapping]] = ...) -> None: ...

class CompositeResponse(_message.Message):
    __slots__ = ("frames", "stages")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[Frame]
    stages: Stages
    def __init__(self, frames: _Optional[_Iterable[_Union[Frame, _Mapping]]] = ..., stages: _Optional[_Union[Stages, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("tenant", "speech", "start", "output", "fps")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SPEECH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    speech: Speech
    start: int
    output: Output
    fps: int
    def __init__(self, tenant: _Optional[str] = ..., speech: _Optional[_Union[Speech, _Mapping]] = ..., start: _Optional[int] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., fps: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("frame", "summary")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    frame: Frame
    summary: Summary
    def __init__(self, frame: _Optional[_Union[Frame, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("data", "number", "pts_samples", "width", "height")
    DATA_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PTS_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    number: int
    pts_samples: int
    width: int
    height: int
    def __init__(self, data: _Optional[bytes] = ..., number: _Optional[int] = ..., pts_samples: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("frames", "fps", "stages")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    frames: int
    fps: int
    stages: Stages
    def __init__(self, frames: _Optional[int] = ..., fps: _Optional[int] = ..., stages: _Optional[_Union[Stages, _Mapping]] = ...) -> None: ...

class Stages(_message.Message):
    __slots__ = ("total_s", "open_s", "load_s", "features_s", "inference_s", "blend_s", "encode_s")
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    OPEN_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    FEATURES_S_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_S_FIELD_NUMBER: _ClassVar[int]
    BLEND_S_FIELD_NUMBER: _ClassVar[int]
    ENCODE_S_FIELD_NUMBER: _ClassVar[int]
    total_s: float
    open_s: float
    load_s: float
    features_s: float
    inference_s: float
    blend_s: float
    encode_s: float
    def __init__(self, total_s: _Optional[float] = ..., open_s: _Optional[float] = ..., load_s: _Optional[float] = ..., features_s: _Optional[float] = ..., inference_s: _Optional[float] = ..., blend_s: _Optional[float] = ..., encode_s: _Optional[float] = ...) -> None: ...
