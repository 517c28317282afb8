"""The operator's view of a repository: what is added is whole, and whatever is refused leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2

from compositor.catalogue import Catalogue
from compositor.errors import InvalidInput, TenantNotFound
from compositor.manifest import tenant_names
from compositor.tenant import Tenant
from lipsync import architecture, repository
from lipsync.graph_builder import GraphBuilder
from lipsync.model_check import probe
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant, disk_bytes, free_name, remove_tenant
from lipsync.sources import Source, open_source

from .conftest import add, can_mount, negative, poked, run, silent, tree, write_source

SCRIPT = """
import json, shutil, subprocess, resource, sys
from pathlib import Path
import onnxruntime
from lipsync import repository
from lipsync.sources import open_source
from compositor.errors import InvalidInput
from tests.lipsync.conftest import add, believe, install_encoder, silent, tree
repository.probe = believe
repository.backend_bytes = lambda *arguments: 1 << 20
source = open_source(Path(sys.argv[1]))
"""


def refused(models: Path, act: Callable[[], object], words: str) -> str:
    """The one line of a refusal that leaves the repository as it was."""
    before = tree(models)
    with pytest.raises(InvalidInput) as caught:
        act()
    assert tree(models) == before
    message = caught.value.message
    assert re.search(words, message), message
    assert "\n" not in message
    return message


def subprocess_run(code: str, *arguments: object, wrapper: str = "") -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [*wrapper.split(), sys.executable, "-c", SCRIPT + code, *map(str, arguments)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_tenant_is_added_whole(models: Path, source: Source) -> None:
    stages: list[str] = []
    manifest = add_tenant(
        models, "anna", source, Choices(), Serving("cpu", 3), lambda stage, done, total: stages.append(stage)
    )
    assert list(dict.fromkeys(stages)) == ["check", "frames", "model", "memory"]
    assert sorted(path.name for path in models.iterdir()) == ["anna", "anna.raw", "audio_encoder"]
    assert tenant_names(models) == ["anna"]
    tenant = Tenant(models, "anna")
    tenant.verify()
    assert tenant.manifest == manifest
    for name in ("anna", "anna.raw"):
        config = text_format.Parse((models / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert config.name == name
        assert config.max_batch_size == 4
        assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
        assert config.parameters["intra_op_thread_count"].string_value == "3"
        assert int(config.parameters["lipsync_memory_bytes"].string_value) == Catalogue(models).facts(name).bytes > 1e7


def test_the_raw_model_is_the_uploaded_one(models: Path, source: Source) -> None:
    add(models, source)
    rng = np.random.default_rng(0)
    feed = {
        "visual": rng.random((2, 6, 320, 320), dtype=np.float32),
        "audio": rng.random((2, 32, 16, 16), dtype=np.float32),
    }
    (expected,) = run(source.model, feed)
    (found,) = run(models / "anna.raw" / "1" / "model.onnx", feed)
    np.testing.assert_array_equal(found, expected)


def test_names_by_role_settle_what_shapes_leave_open(models: Path, source: Source) -> None:
    model = negative()
    model.graph.node.append(helper.make_node("Identity", ["output"], ["other"], "again"))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", 3, 320, 320]))
    source.model.write_bytes(model.SerializeToString())
    refused(models, lambda: add(models, source), "several outputs fit output .*output, other; say which tensor is")
    add_tenant(models, "anna", source, Choices(), Serving(), silent, {"output": "other"})
    Tenant(models, "anna").verify()


@pytest.mark.parametrize(
    "name", ["../anna", "", "Anna", "a" * 65, "a/b", "a\0", ".staging", "-a", "anna.raw", "ä", "a\n"]
)
def test_bad_names_are_refused(models: Path, source: Source, name: str) -> None:
    refused(models, lambda: add(models, source, name), "is no tenant name: use 1 to 64 of a-z 0-9 _ -")
    refused(models, lambda: remove_tenant(models, name), "is no tenant name")
    refused(models, lambda: add_encoder(models, name, source.model), "is no encoder name")
    refused(models, lambda: add(models, source, encoder=name), "is no encoder name")


@pytest.mark.usefixtures("unchecked")
def test_taken_and_reserved_names_are_refused(models: Path, source: Source) -> None:
    refused(
        models, lambda: add(models, source, "audio_encoder"), "'audio_encoder' is the name of the shared audio encoder"
    )
    (models / "berta").symlink_to("nowhere")
    refused(
        models, lambda: add(models, source, "berta"), "'berta' exists already in .*; choose another name, or remove it"
    )
    add(models, source)
    refused(models, lambda: add(models, source), "'anna' exists already in ")
    free_name(models, "carla")


def custom_operator() -> onnx.ModelProto:
    model = negative()
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    return model


def external_data() -> onnx.ModelProto:
    model = negative()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return model


def wrong_shapes() -> onnx.ModelProto:
    model = negative()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 256
    return model


def newer_opset() -> onnx.ModelProto:
    model = negative()
    model.opset_import[0].version = 22
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (custom_operator, r"needs the operator com\.example\.Slice; export with operators of the default ONNX domain"),
        (external_data, r"lies in another file \(external data\); save the model as one file"),
        (wrong_shapes, r"no input has the shape \[n,6,320,320\] of visual"),
        (newer_opset, "opset 22 is outside 11 to 21; export it again with opset 17"),
    ],
)
def test_bad_models_are_refused(models: Path, source: Source, model: Callable[[], onnx.ModelProto], words: str) -> None:
    source.model.write_bytes(model().SerializeToString())
    message = refused(models, lambda: add(models, source), words)
    assert message.startswith(f"avatar model: {source.model}, ")


def nan_for_silence(source: Source, models: Path) -> Source:
    """Sound for ordinary input, NaN for silence's features of -4: the probe cannot see it."""
    graph = GraphBuilder("nan")
    visual, audio = graph.input("visual", ("n", 6, 320, 320)), graph.input("audio", ("n", 32, 16, 16))
    bounds = [graph.constant(name, np.array([value])) for name, value in (("begin", 0), ("end", 3), ("axis", 1))]
    low = graph.node("ReduceMin", [audio], "low", axes=[1, 2, 3], keepdims=1)
    root = graph.node("Sqrt", [graph.node("Add", [low, graph.constant("three", np.float32(3))], "moved")], "root")
    nothing = graph.node("Mul", [root, graph.constant("nothing", np.float32(0))], "zero")
    graph.node("Add", [graph.node("Slice", [visual, *bounds], "roi"), nothing], "sum", output="output")
    graph.output("output", ("n", 3, 320, 320))
    source.model.write_bytes(graph.model().SerializeToString())
    return source


def damaged_frame(source: Source, models: Path) -> Source:
    path = source.frames.path / "frame_5.png"
    path.write_bytes(path.read_bytes()[:3000])
    return source


def no_encoder(source: Source, models: Path) -> Source:
    (models / "audio_encoder" / "1" / "model.onnx").unlink()
    return source


def damaged_encoder(source: Source, models: Path) -> Source:
    (models / "audio_encoder" / "1" / "model.onnx").write_bytes(b"x")
    return source


def reserved_prefix(source: Source, models: Path) -> Source:
    model = negative()
    model.graph.node[0].name = "lipsync/x"
    source.model.write_bytes(model.SerializeToString())
    return source


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nan_for_silence, "predicts NaN or infinity for silence"),
        (damaged_frame, r"frame_5\.png: truncated or damaged"),
        (no_encoder, r"audio_encoder/1/model\.onnx: the audio encoder is not installed; run `lipsync encoder add`"),
        (damaged_encoder, "not a working audio encoder .*`lipsync encoder add --replace`"),
        (reserved_prefix, "uses the reserved prefix"),
    ],
)
def test_a_fault_at_any_stage_leaves_nothing(
    models: Path, source: Source, spoil: Callable[[Source, Path], Source], words: str
) -> None:
    spoiled = spoil(source, models)
    refused(models, lambda: add(models, spoiled), words)


def test_a_model_that_changes_after_its_check_is_refused(
    models: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = probe

    def swap(path: Path, *arguments: Any, **options: Any) -> Any:
        result = check(path, *arguments, **options)
        path.write_bytes(architecture.do_nothing().SerializeToString())
        return result

    monkeypatch.setattr(repository, "probe", swap)
    refused(models, lambda: add(models, source), "changed after it was checked")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("stage", ["check", "frames", "model", "memory"])
def test_an_interruption_leaves_nothing(models: Path, source: Source, stage: str) -> None:
    before = tree(models)

    def interrupt(told: str, done: int, total: int) -> None:
        if told == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_tenant(models, "anna", source, Choices(), Serving(), interrupt)
    assert tree(models) == before


@pytest.mark.usefixtures("unchecked")
def test_an_orphaned_raw_model_is_replaced(models: Path, source: Source) -> None:
    orphan = models / "anna.raw" / "1" / "model.onnx"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"orphan")
    add(models, source)
    assert onnx.load(orphan).graph.name == "negative"


@pytest.mark.usefixtures("unchecked")
def test_of_two_adds_of_one_name_one_wins(models: Path, tmp_path: Path) -> None:
    """Both are prepared before either is installed; tenant and raw model must be of the same one."""
    together = threading.Barrier(2)
    outcomes: dict[str, str] = {}

    def meet(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("model", 1):
            together.wait(120)

    def one(name: str, source: Source) -> None:
        try:
            add_tenant(models, "anna", source, Choices(), Serving(), meet)
            outcomes[name] = "won"
        except InvalidInput as error:
            outcomes[name] = error.message

    uploads = {"negative": negative(), "poked": poked()}
    threads = []
    for name, model in uploads.items():
        opened = open_source(write_source(tmp_path / name, model))
        threads.append(threading.Thread(target=one, args=(name, opened)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    (winner,) = (name for name, outcome in outcomes.items() if outcome == "won")
    (loser,) = (name for name in outcomes if name != winner)
    assert re.match(r"'anna' exists already in .*; remove it first", outcomes[loser])
    tenant = Tenant(models, "anna")
    tenant.verify()
    assert onnx.load(models / "anna.raw" / "1" / "model.onnx").graph.name == winner
    nodes = onnx.load(tenant.directory / "model.onnx", load_external_data=False).graph.node
    assert ("negate" in [node.name for node in nodes]) == (winner == "negative")
    assert sorted(path.name for path in models.iterdir()) == ["anna", "anna.raw", "audio_encoder"]


FULL = """
def attempt(models, how, size):
    install_encoder(models)
    before = tree(models)
    message = ""
    if how == "limit":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        add(models, source)
    except InvalidInput as error:
        message = error.message
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return message, tree(models) == before

how, base, sizes, check_space = json.loads(sys.argv[2])
if not check_space:
    repository._check_space = lambda *_: None
results = []
for size in sizes:
    models = Path(base) / str(size)
    models.mkdir()
    if how == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(models)], check=True)
    results.append(attempt(models, how, size))
print(json.dumps(results))
"""


def full_disk(source: Source, base: Path, how: str, sizes: list[int], check_space: bool = False) -> list[list[Any]]:
    base.mkdir()
    wrapper = can_mount() if how == "tmpfs" else ""
    request = json.dumps([how, str(base), sizes, check_space])
    with subprocess_run(FULL, source.model.parents[1], request, wrapper=wrapper) as process:
        printed, _ = process.communicate(timeout=240)
    results: list[list[Any]] = json.loads(printed)
    return results


@pytest.mark.usefixtures("unchecked")
def test_a_full_disk_half_way_leaves_nothing(models: Path, source: Source, tmp_path: Path) -> None:
    """On a real small file system where one can be mounted; by the limit on a file's size everywhere."""
    add(models, source)
    version = models / "anna" / "1"
    largest = max(path.stat().st_size for path in version.iterdir())
    total = disk_bytes(models, "anna")
    limits = [5_000, (version / "scans.bin").stat().st_size - 1, largest // 2, largest - 1]
    results = full_disk(source, tmp_path / "limit", "limit", limits)
    assert [clean for _, clean in results] == [True] * 4
    assert all("File too large; nothing was installed; free some space and try again" in text for text, _ in results)
    if can_mount():
        pages = [total * tenths // 10 // 4096 * 4096 for tenths in (1, 5, 9)]
        results = full_disk(source, tmp_path / "tmpfs", "tmpfs", [*pages, total * 2])
        assert [clean for _, clean in results] == [True, True, True, False]
        for text, _ in results[:3]:
            assert "No space left on device; nothing was installed; free some space and try again" in text
        assert results[3][0] == "", "with room it is added"
        ((text, clean),) = full_disk(source, tmp_path / "early", "tmpfs", pages[1:2], check_space=True)
        assert clean
        assert re.search(r"MiB free, but the tenant takes about \d+ MiB; free some space", text)


def test_what_cannot_fit_is_refused_early(
    models: Path, source: Source, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    usage = shutil.disk_usage(models)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 << 20))
    monkeypatch.setattr(repository, "staging", lambda *_: pytest.fail("began to write"))
    refused(models, lambda: add(models, source), ": 3 MiB free, but the tenant takes about [3-9] MiB; free some space")


@pytest.mark.usefixtures("unchecked")
def test_a_kill_half_way_leaves_no_tenant_and_the_next_add_sweeps(models: Path, source: Source) -> None:
    code = """
def stop(stage, done, total):
    if stage == "frames" and done == 5:
        print("half way", flush=True)
        input()
repository.add_tenant(Path(sys.argv[2]), "anna", source, repository.Choices(), repository.Serving(), stop)
"""
    before = tree(models)
    with subprocess_run(code, source.model.parents[1], models) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        add(models, source, "berta")
        assert list((models / ".staging").glob("anna.*/anna/1/crops.bin")), "the living one is left alone"
        process.send_signal(signal.SIGKILL)
    assert tenant_names(models) == ["berta"]
    remove_tenant(models, "berta")
    assert tree(models) == before, "which swept what the dead one left"
    add(models, source)
    Tenant(models, "anna").verify()


@pytest.mark.usefixtures("unchecked")
def test_remove_takes_everything(models: Path, source: Source) -> None:
    before = tree(models)
    add(models, source)
    remove_tenant(models, "anna")
    assert tree(models) == before
    with pytest.raises(TenantNotFound, match="no tenant named 'anna' is installed"):
        remove_tenant(models, "anna")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("fault", ["garbage", "no manifest", "no raw"])
def test_damaged_tenants_can_be_removed(models: Path, source: Source, fault: str) -> None:
    before = tree(models)
    add(models, source)
    if fault == "garbage":
        (models / "anna" / "1" / "manifest.json").write_text("garbage")
    if fault == "no manifest":
        (models / "anna" / "1" / "manifest.json").unlink()
    if fault == "no raw":
        shutil.rmtree(models / "anna.raw")
    remove_tenant(models, "anna")
    assert tree(models) == before


def test_encoders_are_not_removed_as_tenants(models: Path) -> None:
    before = tree(models)
    with pytest.raises(TenantNotFound):
        remove_tenant(models, "audio_encoder")
    assert tree(models) == before


@pytest.mark.usefixtures("unchecked")
def test_disk_bytes_counts_tenant_and_raw_model(models: Path, source: Source) -> None:
    add(models, source)
    folders = [models / "anna", models / "anna.raw"]
    expected = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert disk_bytes(models, "anna") == expected
    assert expected > 8 * 328 * 328 * 3
    assert disk_bytes(models, "nobody") == 0


def test_an_encoder_is_added_and_replaced(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name, model in (("first", architecture.do_nothing_encoder()), ("second", architecture.audio_encoder(0.1))):
        (tmp_path / name).write_bytes(model.SerializeToString())
    add_encoder(models, "audio_encoder", tmp_path / "first")
    assert sorted(tree(models)) == [
        "audio_encoder", "audio_encoder/1", "audio_encoder/1/model.onnx", "audio_encoder/config.pbtxt"
    ]  # fmt: skip
    refused(
        models,
        lambda: add_encoder(models, "audio_encoder", tmp_path / "second"),
        "'audio_encoder' exists already in .*; use --replace to install it anew",
    )
    add_encoder(models, "audio_encoder", tmp_path / "second", replace=True)
    assert onnx.load(models / "audio_encoder" / "1" / "model.onnx").graph.name == "audio_encoder"
    assert sorted(path.name for path in models.iterdir()) == ["audio_encoder"]
    mel = np.zeros((2, 1, 80, 16), np.float32)
    assert run(models / "audio_encoder" / "1" / "model.onnx", {"mel_spectrogram": mel})[0].shape == (2, 512)


def test_an_encoder_that_is_refused_replaces_nothing(models: Path, source: Source) -> None:
    def replace_it() -> None:
        add_encoder(models, "audio_encoder", source.model, replace=True)

    refused(models, replace_it, "audio encoder: .*it has 2 inputs")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("again", [False, True])
def test_an_encoder_never_takes_a_tenants_place(models: Path, source: Source, again: bool) -> None:
    add(models, source)
    refused(
        models,
        lambda: add_encoder(models, "anna", source.model, replace=again),
        "'anna' is a tenant in .*; choose another",
    )


@pytest.mark.usefixtures("unchecked")
def test_an_add_into_a_new_repository_makes_it(tmp_path: Path, source: Source) -> None:
    models = tmp_path / "deep" / "down"
    add(models, source, idle="background")
    assert tenant_names(models) == ["anna"]


@pytest.mark.usefixtures("unchecked")
def test_a_repository_that_is_a_file_is_refused(tmp_path: Path, source: Source) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInput, match="file: cannot be written"):
        add(tmp_path / "file", source, idle="background")


@pytest.mark.usefixtures("unchecked")
def test_a_second_encoder_is_used_by_the_tenants_that_name_it(models: Path, source: Source) -> None:
    (models / "audio_encoder").rename(models / "other")
    refused(models, lambda: add(models, source), "audio_encoder/1/model.onnx: the audio encoder is not installed")
    add(models, source, encoder="other")
    assert Tenant(models, "anna").manifest.encoder == "other"


def test_the_check_runs_at_the_batch_that_is_served(
    models: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    check = probe

    def noting(path: Path, batch: int, **options: Any) -> Any:
        asked.append(batch)
        return check(path, batch, **options)

    monkeypatch.setattr(repository, "probe", noting)
    add(models, source, max_batch_size=2, idle="background")
    assert asked == [2]
    assert "max_batch_size: 2\n" in (models / "anna" / "config.pbtxt").read_text()
