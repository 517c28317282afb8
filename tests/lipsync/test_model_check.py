"""Uploaded models through the real child process: what passes, what is refused, that limits and crashes stay there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from compositor.errors import InvalidInput, Status
from lipsync import probe_child
from lipsync.architecture import audio_encoder, do_nothing, do_nothing_encoder, unet
from lipsync.graph_builder import GraphBuilder
from lipsync.model_check import ProbeResult, inspect, inspect_encoder, load_dynamic, probe
from lipsync.model_interface import AVATAR, ENCODER, AvatarModel, EncoderModel, Interface

from ..integration.waiting import until

MIB = 1 << 20


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def fixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as an exporter without dynamic_axes writes it: batch 1 at both ends and in every tensor between."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def avatar(batch: int | str, finish: Callable[[GraphBuilder, str, str], object]) -> onnx.ModelProto:
    """A model whose `finish(graph, roi, audio)` makes the tensor `output` of the picture's first three channels."""
    graph = GraphBuilder("crafted")
    visual, audio = graph.input("visual", (batch, 6, 320, 320)), graph.input("audio", (batch, 32, 16, 16))
    bounds = [graph.constant(name, np.array([value])) for name, value in (("begin", 0), ("end", 3), ("axis", 1))]
    finish(graph, graph.node("Slice", [visual, *bounds], "roi"), audio)
    graph.output("output", (batch, 3, 320, 320))
    return graph.model()


def plus_constant(value: float) -> onnx.ModelProto:
    return avatar(
        "n", lambda g, roi, _: g.node("Add", [roi, g.constant("c", np.float32(value))], "add", output="output")
    )


def over_the_batch(graph: GraphBuilder, roi: str, _: str) -> None:
    """Each row takes something of all the others."""
    mean = graph.node("ReduceMean", [roi], "mean", axes=[0], keepdims=1)
    graph.node("Mul", [roi, mean], "mix", output="output")


def frozen_reshape(graph: GraphBuilder, roi: str, _: str) -> None:
    """What a fixed export makes of view(x.size(0), ...)."""
    graph.node("Reshape", [roi, graph.constant("shape", np.array([1, 3, 320, 320]))], "view", output="output")


def frozen_resize(graph: GraphBuilder, roi: str, _: str) -> None:
    """Sizes with the batch in them: it runs at any batch and answers one row."""
    sizes = graph.constant("sizes", np.array([1, 3, 320, 320]))
    graph.node("Resize", [roi, "", "", sizes], "grow", output="output", mode="nearest")


def shrunk(graph: GraphBuilder, roi: str, audio: str) -> None:
    """Half the rows, by a factor that hangs on an input, so that no shape inference sees it."""
    corner = graph.node("ReduceMax", [audio], "corner", axes=[0, 1, 2, 3], keepdims=0)
    none = graph.node("Mul", [corner, graph.constant("zero", np.float32(0))], "none")
    scales = graph.node("Add", [none, graph.constant("half", np.array([1, 1, 0.5, 1], np.float32))], "scales")
    graph.node("Resize", [roi, "", scales], "shrink", output="output", mode="nearest")


def greedy(graph: GraphBuilder, roi: str, audio: str) -> None:
    """Asks for 2 GiB once it runs; the size hangs on an input, so that no optimiser folds it."""
    corner = graph.node("ReduceMax", [audio], "corner", axes=[0, 1, 2, 3], keepdims=0)
    none = graph.node("Mul", [corner, graph.constant("zero", np.float32(0))], "none")
    many = graph.node("Add", [none, graph.constant("many", np.array([2**29], np.float32))], "many_floats")
    count = graph.node("Cast", [many], "count", to=TensorProto.INT64)
    sea = graph.node("ConstantOfShape", [count], "sea")
    drop = graph.node("ReduceMax", [sea], "drop", axes=[0], keepdims=0)
    graph.node("Add", [roi, drop], "add", output="output")


def endless(graph: GraphBuilder, roi: str, _: str) -> None:
    """A loop of 2**62 turns."""
    turn = [helper.make_tensor_value_info("turn", TensorProto.INT64, [])]
    going = helper.make_tensor_value_info("going", TensorProto.BOOL, [])
    carried = helper.make_tensor_value_info("carried", TensorProto.FLOAT, None)
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["on"]), helper.make_node("Sigmoid", ["carried"], ["next"])],
        "body",
        [*turn, going, carried],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", 1, None)],
    )
    turns, yes = graph.constant("turns", np.int64(2**62)), graph.constant("yes", np.bool_(True))
    graph.node("Loop", [turns, yes, roi], "loop", output="output", body=body)


def refused(check: Callable[..., object], *arguments: Any, **options: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        check(*arguments, **options)
    assert caught.value.status is Status.INVALID_ARGUMENT
    message = caught.value.message
    assert message.count("; ") == 1
    assert "\n" not in message
    return message


def test_an_avatar_model_is_inspected(tmp_path: Path) -> None:
    path = saved(tmp_path, unet(0.1))
    found = inspect(path)
    assert isinstance(found, AvatarModel)
    assert (found.visual, found.audio, found.output, found.opset, found.ir) == ("visual", "audio", "output", 17, 8)
    assert (found.batch, found.size_bytes) == ("dynamic", path.stat().st_size)


def test_an_encoder_is_inspected_and_probed(tmp_path: Path) -> None:
    path = saved(tmp_path, audio_encoder(0.25))
    found = inspect_encoder(path)
    assert isinstance(found, EncoderModel)
    assert (found.mel, found.features) == ("mel_spectrogram", "audio_features")
    assert probe(path, 5, interface=ENCODER).model == found
    assert refused(inspect_encoder, saved(tmp_path, do_nothing())).startswith(f"audio encoder: {path}, it has 2 inputs")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("export", [lambda model: model, fixed], ids=["dynamic", "fixed"])
def test_the_real_architecture_passes(
    tmp_path: Path, export: Callable[[onnx.ModelProto], onnx.ModelProto], batch: int
) -> None:
    result = probe(saved(tmp_path, export(unet(0.1))), batch)
    assert isinstance(result, ProbeResult)
    assert isinstance(result.model, AvatarModel)
    assert (result.batch, result.threads) == (batch, 1)
    assert 0 < result.seconds_per_frame < 60
    assert 30 * MIB < result.peak_rss_bytes < 2048 * MIB


@pytest.mark.parametrize("interface", [AVATAR, ENCODER], ids=["avatar", "encoder"])
def test_the_models_for_benchmarks_pass(tmp_path: Path, interface: Interface) -> None:
    path = saved(tmp_path, do_nothing() if interface is AVATAR else do_nothing_encoder())
    assert probe(path, 4, interface=interface).model.batch == "dynamic"


def test_names_reach_the_child(tmp_path: Path) -> None:
    path = saved(tmp_path, do_nothing())
    names = {"visual": "visual", "audio": "audio", "output": "output"}
    assert probe(path, 1, names=names).model == inspect(path, names=names)
    assert "no input 'x' for visual" in refused(inspect, path, names={"visual": "x"})


def test_load_dynamic_makes_a_fixed_batch_free(tmp_path: Path) -> None:
    path = saved(tmp_path, fixed(unet(0.1)))
    found = inspect(path)
    assert found.batch == "fixed"
    model = load_dynamic(path, found)
    assert model == unet(0.1)
    feed = {"visual": np.zeros((2, 6, 320, 320), np.float32), "audio": np.zeros((2, 32, 16, 16), np.float32)}
    (output,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    assert output.shape == (2, 3, 320, 320)


def test_load_dynamic_refuses_another_file_than_was_checked(tmp_path: Path) -> None:
    path = saved(tmp_path, unet(0.1, seed=1))
    found = inspect(path)
    saved(tmp_path, unet(0.1, seed=2))
    assert path.stat().st_size == found.size_bytes
    assert "it changed after it was checked" in refused(load_dynamic, path, found)
    path.write_bytes(path.read_bytes() + b"\0")
    assert "it changed after it was checked" in refused(load_dynamic, path, found)
    path.unlink()
    assert "cannot be read (No such file" in refused(load_dynamic, path, found)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(inspect, tmp_path / "pipe").endswith("pipe, not a file; give an ONNX file")
    assert "not a file" in refused(inspect, tmp_path)
    assert "cannot be read (No such file" in refused(inspect, tmp_path / "missing.onnx")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    assert "3,221,225,472 bytes are more than the limit of 1,500,000,000" in refused(inspect, path)
    assert "more than the limit of 100" in refused(probe, saved(tmp_path, do_nothing()), 1, limit_bytes=100)


def test_a_strange_path_stays_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.onnx"
    path.write_bytes(b"")
    message = refused(inspect, path)
    assert "the file is empty" in message
    assert message.isprintable()


CRAFTED: list[tuple[str, onnx.ModelProto, int, str]] = [
    ("too bright", plus_constant(1.0), 1, "ranges from 1 to 2; outputs must be sigmoid in [0,1]"),
    ("negative", plus_constant(-0.9), 1, "outputs must be sigmoid in [0,1]"),
    ("not a number", plus_constant(float("nan")), 1, "NaN or infinity"),
    ("infinite", plus_constant(float("inf")), 1, "NaN or infinity"),
    ("rows mixed", avatar("n", over_the_batch), 3, "of a batch of 3 differs from the same row alone; "),
    ("reshape frozen", avatar(1, frozen_reshape), 2, "it fails at batch 2 ("),
    ("resize frozen", avatar(1, frozen_resize), 2, "export with dynamic_axes"),
    ("other shape", avatar("n", shrunk), 1, "it answers float32 [1, 3, 160, 320] instead of float32 [1, 3, 320, 320]"),
]


@pytest.mark.parametrize(("model", "batch", "fault"), [case[1:] for case in CRAFTED], ids=[case[0] for case in CRAFTED])
def test_models_that_answer_wrongly_are_refused(tmp_path: Path, model: onnx.ModelProto, batch: int, fault: str) -> None:
    path = saved(tmp_path, model)
    inspect(path)
    message = refused(probe, path, batch)
    assert message.startswith(f"avatar model: {path}, ")
    assert fault in message


def test_a_model_that_onnx_runtime_does_not_load_is_refused(tmp_path: Path) -> None:
    def mismatched(graph: GraphBuilder, roi: str, audio: str) -> None:
        graph.node("Concat", [roi, audio], "join", output="output", axis=1)

    assert "ONNX Runtime does not load it (" in refused(probe, saved(tmp_path, avatar("n", mismatched)), 1)


def test_memory_is_limited(tmp_path: Path) -> None:
    path = saved(tmp_path, avatar("n", greedy))
    message = refused(probe, path, 1, memory_limit_bytes=1024 * MIB)
    assert "it needs more than 1,024 MiB of memory; " in message


def test_parsing_is_under_the_memory_limit_too(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(600 * MIB)
    assert "of memory; " in refused(probe, path, 1, memory_limit_bytes=300 * MIB)


def test_time_is_limited(tmp_path: Path) -> None:
    path = saved(tmp_path, avatar("n", endless))
    assert "checking it took longer than 2 s; " in refused(probe, path, 1, timeout_s=2.0)


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, *lines: str) -> None:
    """Puts a shell script in the child's place: what a taken-over or crashing child could do."""
    script = folder / "python"
    script.write_text("\n".join(["#!/bin/sh", *lines]))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))


HONEST = '"inputs":["visual","audio"],"output":"output","opset":17,"ir":8,"batch":"dynamic","size_bytes":1'
DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["kill -SEGV $$"], "it crashes ONNX Runtime (Segmentation fault)"),
        (["kill -ABRT $$"], "it crashes ONNX Runtime (Aborted)"),
        (["kill -KILL $$"], "the check was killed, most likely because the machine ran out of memory"),
        (["kill -XCPU $$"], "took longer than"),
        (["echo 'numpy: MemoryError' >&2", "exit 1"], "took more memory than allowed"),
        (["echo 'ImportError: no onnx' >&2", "exit 3"], "the check failed (ImportError: no onnx); "),
        ([], "the check answered nonsense"),
        (["echo '{}'"], "the check answered nonsense"),
        (["echo '[1'"], "the check answered nonsense"),
        (["head -c 5000000 /dev/zero"], "the check answered nonsense"),
        ([f"""echo '{{"model":{{{HONEST},"sha256":"../x"}}}}'"""], "the check answered nonsense"),
        ([f"""echo '{{"model":{{{HONEST},"sha256":"{DIGEST}","more":1}}}}'"""], "the check answered nonsense"),
        (
            [f"""echo '{{"model":{{{HONEST},"sha256":"{DIGEST}"}}}}' | sed 's/"visual",//'"""],
            "the check answered nonsense",
        ),
        (
            [f"""echo '{{"model":{{{HONEST},"sha256":"{DIGEST}"}}}}' | sed 's/"visual"/"a b"/'"""],
            "the check answered nonsense",
        ),
    ],
)
def test_only_a_sound_report_is_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: Sequence[str], fault: str
) -> None:
    path = saved(tmp_path, do_nothing())
    stand_in(monkeypatch, tmp_path, *lines)
    assert fault in refused(inspect, path)


def test_the_report_that_the_others_falsify_is_believed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(tmp_path, do_nothing())
    stand_in(monkeypatch, tmp_path, f"""echo '{{"model":{{{HONEST},"sha256":"{DIGEST}"}}}}'""")
    assert inspect(path).inputs == ("visual", "audio")
    # An inspection is no probe.
    assert "the check answered nonsense" in refused(probe, path, 1)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended stays as a zombie until its new parent reaps it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_the_whole_group_dies_with_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, note, wait = saved(tmp_path, do_nothing()), tmp_path / "pid", probe_child._wait

    def wait_once_noted(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
        until(lambda: note.exists() and note.read_text().endswith("\n"))
        return wait(process, timeout_s)

    monkeypatch.setattr(probe_child, "_wait", wait_once_noted)
    stand_in(monkeypatch, tmp_path, "sleep 300 &", f"echo $! > {note}", "wait")
    assert "longer than 0.2 s" in refused(probe, path, 1, timeout_s=0.2)
    left = int(note.read_text())
    until(lambda: not is_alive(left))


def test_the_child_sees_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(tmp_path, do_nothing())
    monkeypatch.setenv("LIPSYNC_TOKEN", "secret")
    stand_in(monkeypatch, tmp_path, f"env > {tmp_path}/env", "exit 1")
    refused(inspect, path)
    assert "PATH=" in (tmp_path / "env").read_text()
    assert "secret" not in (tmp_path / "env").read_text()


def test_a_batch_below_one_is_refused(tmp_path: Path) -> None:
    assert "batch: 0 is below 1; " in refused(probe, saved(tmp_path, do_nothing()), 0)
