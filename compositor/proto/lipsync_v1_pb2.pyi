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

class SpeakRequest(_message.Message):
    __slots__ = ("start", "audio", "segment_end", "interrupt", "ack", "switch")
    class Flow(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FLOW_UNSPECIFIED: _ClassVar[SpeakRequest.Flow]
        CREDIT: _ClassVar[SpeakRequest.Flow]
        PLAIN: _ClassVar[SpeakRequest.Flow]
    FLOW_UNSPECIFIED: SpeakRequest.Flow
    CREDIT: SpeakRequest.Flow
    PLAIN: SpeakRequest.Flow
    class Picture(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PICTURE_UNSPECIFIED: _ClassVar[SpeakRequest.Picture]
        FRAMES: _ClassVar[SpeakRequest.Picture]
        PATCHES: _ClassVar[SpeakRequest.Picture]
    PICTURE_UNSPECIFIED: SpeakRequest.Picture
    FRAMES: SpeakRequest.Picture
    PATCHES: SpeakRequest.Picture
    class Start(_message.Message):
        __slots__ = ("tenant", "sample_rate", "encoding", "fps", "start", "flow", "picture", "output", "audio")
        TENANT_FIELD_NUMBER: _ClassVar[int]
        SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
        ENCODING_FIELD_NUMBER: _ClassVar[int]
        FPS_FIELD_NUMBER: _ClassVar[int]
        START_FIELD_NUMBER: _ClassVar[int]
        FLOW_FIELD_NUMBER: _ClassVar[int]
        PICTURE_FIELD_NUMBER: _ClassVar[int]
        OUTPUT_FIELD_NUMBER: _ClassVar[int]
        AUDIO_FIELD_NUMBER: _ClassVar[int]
        tenant: str
        sample_rate: int
        encoding: Speech.Encoding
        fps: int
        start: int
        flow: SpeakRequest.Flow
        picture: SpeakRequest.Picture
        output: Output
        audio: bool
        def __init__(self, tenant: _Optional[str] = ..., sample_rate: _Optional[int] = ..., encoding: _Optional[_Union[Speech.Encoding, str]] = ..., fps: _Optional[int] = ..., start: _Optional[int] = ..., flow: _Optional[_Union[SpeakRequest.Flow, str]] = ..., picture: _Optional[_Union[SpeakRequest.Picture, str]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., audio: _Optional[bool] = ...) -> None: ...
    class Audio(_message.Message):
        __slots__ = ("data",)
        DATA_FIELD_NUMBER: _ClassVar[int]
        data: bytes
        def __init__(self, data: _Optional[bytes] = ...) -> None: ...
    class SegmentEnd(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Interrupt(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Ack(_message.Message):
        __slots__ = ("pts",)
        PTS_FIELD_NUMBER: _ClassVar[int]
        pts: int
        def __init__(self, pts: _Optional[int] = ...) -> None: ...
    class Switch(_message.Message):
        __slots__ = ("tenant",)
        TENANT_FIELD_NUMBER: _ClassVar[int]
        tenant: str
        def __init__(self, tenant: _Optional[str] = ...) -> None: ...
    START_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_END_FIELD_NUMBER: _ClassVar[int]
    INTERRUPT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    SWITCH_FIELD_NUMBER: _ClassVar[int]
    start: SpeakRequest.Start
    audio: SpeakRequest.Audio
    segment_end: SpeakRequest.SegmentEnd
    interrupt: SpeakRequest.Interrupt
    ack: SpeakRequest.Ack
    switch: SpeakRequest.Switch
    def __init__(self, start: _Optional[_Union[SpeakRequest.Start, _Mapping]] = ..., audio: _Optional[_Union[SpeakRequest.Audio, _Mapping]] = ..., segment_end: _Optional[_Union[SpeakRequest.SegmentEnd, _Mapping]] = ..., interrupt: _Optional[_Union[SpeakRequest.Interrupt, _Mapping]] = ..., ack: _Optional[_Union[SpeakRequest.Ack, _Mapping]] = ..., switch: _Optional[_Union[SpeakRequest.Switch, _Mapping]] = ...) -> None: ...

class SpeakResponse(_message.Message):
    __slots__ = ("started", "frame", "audio", "playback_started", "playback_finished", "error")
    class Started(_message.Message):
        __slots__ = ("session", "tenant", "epoch", "sample_rate", "fps", "width", "height", "frames", "lookahead_ms")
        SESSION_FIELD_NUMBER: _ClassVar[int]
        TENANT_FIELD_NUMBER: _ClassVar[int]
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
        FPS_FIELD_NUMBER: _ClassVar[int]
        WIDTH_FIELD_NUMBER: _ClassVar[int]
        HEIGHT_FIELD_NUMBER: _ClassVar[int]
        FRAMES_FIELD_NUMBER: _ClassVar[int]
        LOOKAHEAD_MS_FIELD_NUMBER: _ClassVar[int]
        session: str
        tenant: str
        epoch: int
        sample_rate: int
        fps: int
        width: int
        height: int
        frames: int
        lookahead_ms: int
        def __init__(self, session: _Optional[str] = ..., tenant: _Optional[str] = ..., epoch: _Optional[int] = ..., sample_rate: _Optional[int] = ..., fps: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., frames: _Optional[int] = ..., lookahead_ms: _Optional[int] = ...) -> None: ...
    class Frame(_message.Message):
        __slots__ = ("pts", "epoch", "number", "speaking", "data", "patch", "dropped")
        PTS_FIELD_NUMBER: _ClassVar[int]
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        NUMBER_FIELD_NUMBER: _ClassVar[int]
        SPEAKING_FIELD_NUMBER: _ClassVar[int]
        DATA_FIELD_NUMBER: _ClassVar[int]
        PATCH_FIELD_NUMBER: _ClassVar[int]
        DROPPED_FIELD_NUMBER: _ClassVar[int]
        pts: int
        epoch: int
        number: int
        speaking: bool
        data: bytes
        patch: SpeakResponse.Box
        dropped: int
        def __init__(self, pts: _Optional[int] = ..., epoch: _Optional[int] = ..., number: _Optional[int] = ..., speaking: _Optional[bool] = ..., data: _Optional[bytes] = ..., patch: _Optional[_Union[SpeakResponse.Box, _Mapping]] = ..., dropped: _Optional[int] = ...) -> None: ...
    class Box(_message.Message):
        __slots__ = ("x", "y", "width", "height")
        X_FIELD_NUMBER: _ClassVar[int]
        Y_FIELD_NUMBER: _ClassVar[int]
        WIDTH_FIELD_NUMBER: _ClassVar[int]
        HEIGHT_FIELD_NUMBER: _ClassVar[int]
        x: int
        y: int
        width: int
        height: int
        def __init__(self, x: _Optional[int] = ..., y: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...
    class Audio(_message.Message):
        __slots__ = ("pts", "epoch", "data")
        PTS_FIELD_NUMBER: _ClassVar[int]
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        DATA_FIELD_NUMBER: _ClassVar[int]
        pts: int
        epoch: int
        data: bytes
        def __init__(self, pts: _Optional[int] = ..., epoch: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
    class PlaybackStarted(_message.Message):
        __slots__ = ("pts", "epoch")
        PTS_FIELD_NUMBER: _ClassVar[int]
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        pts: int
        epoch: int
        def __init__(self, pts: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...
    class PlaybackFinished(_message.Message):
        __slots__ = ("pts", "epoch", "position", "interrupted")
        PTS_FIELD_NUMBER: _ClassVar[int]
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        POSITION_FIELD_NUMBER: _ClassVar[int]
        INTERRUPTED_FIELD_NUMBER: _ClassVar[int]
        pts: int
        epoch: int
        position: int
        interrupted: bool
        def __init__(self, pts: _Optional[int] = ..., epoch: _Optional[int] = ..., position: _Optional[int] = ..., interrupted: _Optional[bool] = ...) -> None: ...
    class Error(_message.Message):
        __slots__ = ("pts", "epoch", "status", "reason", "message", "field", "retry_after_s")
        PTS_FIELD_NUMBER: _ClassVar[int]
        EPOCH_FIELD_NUMBER: _ClassVar[int]
        STATUS_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        FIELD_FIELD_NUMBER: _ClassVar[int]
        RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
        pts: int
        epoch: int
        status: str
        reason: str
        message: str
        field: str
        retry_after_s: float
        def __init__(self, pts: _Optional[int] = ..., epoch: _Optional[int] = ..., status: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    PLAYBACK_STARTED_FIELD_NUMBER: _ClassVar[int]
    PLAYBACK_FINISHED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    started: SpeakResponse.Started
    frame: SpeakResponse.Frame
    audio: SpeakResponse.Audio
    playback_started: SpeakResponse.PlaybackStarted
    playback_finished: SpeakResponse.PlaybackFinished
    error: SpeakResponse.Error
    def __init__(self, started: _Optional[_Union[SpeakResponse.Started, _Mapping]] = ..., frame: _Optional[_Union[SpeakResponse.Frame, _Mapping]] = ..., audio: _Optional[_Union[SpeakResponse.Audio, _Mapping]] = ..., playback_started: _Optional[_Union[SpeakResponse.PlaybackStarted, _Mapping]] = ..., playback_finished: _Optional[_Union[SpeakResponse.PlaybackFinished, _Mapping]] = ..., error: _Optional[_Union[SpeakResponse.Error, _Mapping]] = ...) -> None: ...
