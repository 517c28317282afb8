"""`lipsync tenant` as an operator meets it: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from compositor.errors import InvalidInput
from compositor.manifest import MANIFEST, tenant_names
from compositor.settings import TritonSettings
from compositor.tenant import Tenant
from lipsync import app, repository
from lipsync.commands import console, tenant
from lipsync.sources import open_source
from lipsync.tenant_list import Copy, Entry

from .conftest import add, install_encoder, negative, tree, write_source


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


Lipsync = Callable[..., Done]
NOWHERE = "127.0.0.1:1"
SILENT = f"Triton at {NOWHERE}: it does not answer; what it has loaded is not known"


@pytest.fixture(autouse=True)
def _no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings' Triton is one that is not there, whatever runs on this machine."""
    monkeypatch.setenv("LIPSYNC_TRITON__ENDPOINTS", NOWHERE)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tenant's `source` and a repository, `models`, in which it is installed as anna."""
    root = tmp_path_factory.mktemp("commands")
    install_encoder(root / "models")
    add(root / "models", open_source(write_source(root / "source")))
    return root


@pytest.fixture
def models(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "models", tmp_path / "models"))


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "source", tmp_path / "source"))


@pytest.fixture
def lipsync(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lipsync:
    """The command in this process: its exit status and what it wrote, however slow the machine is."""
    monkeypatch.setattr(console, "SAY_EVERY_S", 1e9)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lipsync", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return run


def refused(done: Done, words: str) -> None:
    """Exit status 1 and one line on stderr, whatever its length."""
    assert (done.status, done.out) == (1, "")
    assert done.err.count("\n") == 1, done.err
    assert re.match("error: .*" + words, done.err), done.err


def test_add_show_verify_list_remove(models: Path, source: Path, lipsync: Lipsync) -> None:
    before = tree(models)
    done = lipsync("tenant", "add", "berta", source, "-r", models, "--quality", 60, "--blend", "hard", "--fps", 30)
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(r"tenant berta added in \d+\.\d s: 8 frames of 320x240, \d\.\d MB\n", done.out)
    Tenant(models, "berta").verify()

    listed = lipsync("tenant", "list", "-r", models)
    assert listed.status == 0
    heading, *rows = (re.split(r"  +", line) for line in listed.out.splitlines())
    assert heading == ["tenant", "state", "device", "last use", "uses", "memory", *heading[6:]]
    assert heading[6:] == ["frames", "size", "fps", "encoder", "added"]
    assert [(row[:5], row[6:10]) for row in rows] == [
        (["anna", "?", "-", "-", "-"], ["8", "320x240", "25", "audio_encoder"]),
        (["berta", "?", "-", "-", "-"], ["8", "320x240", "30", "audio_encoder"]),
    ]
    assert all(re.fullmatch(r"\d\d\.\d MB", row[5]) for row in rows)
    assert listed.err == f"{SILENT}\n"

    shown = lipsync("tenant", "show", "berta", "-r", models)
    values = dict(re.split(r"  +", line, maxsplit=1) for line in shown.out.splitlines())
    expected = {"tenant": "berta", "frames": "8", "quality": "60", "blend": "hard", "idle": "rendered", "fps": "30"}
    assert values.items() >= {**expected, "subsampling": "4:2:0", "crops": "resident", "max batch size": "4"}.items()
    assert re.fullmatch(r"\d\.\d MB", values["disk"])
    assert all(re.fullmatch(r"\d\d\.\d MB", values[label]) for label in ("memory", "memory of the raw model"))
    assert {"file crops.bin", "file model.onnx"} <= values.keys()

    assert lipsync("tenant", "verify", "berta", "-r", models) == Done(0, "tenant berta is sound\n", "")
    assert lipsync("tenant", "remove", "berta", "-r", models) == Done(0, "tenant berta removed\n", "")
    assert tree(models) == before


def test_parts_are_taken_one_by_one(models: Path, source: Path, lipsync: Lipsync) -> None:
    done = lipsync(
        "tenant", "add", "berta", "-r", models, "--model", source / "checkpoint" / "model_best.onnx",
        "--frames", source / "frames", "--crop-rects", source / "crop_rects.json", "--idle", "background",
        "--crops", "sent", "--subsampling", "4:4:4", "--max-batch-size", 3, "--kind", "cpu", "--threads", 1,
        "--visual", "visual", "--audio", "audio", "--output", "output",
    )  # fmt: skip
    assert (done.status, done.err) == (0, "")
    manifest = Tenant(models, "berta").manifest
    assert (manifest.idle, manifest.crops, manifest.subsampling.value, manifest.max_batch_size) == (
        "background", "sent", "4:4:4", 3
    )  # fmt: skip
    config = (models / "berta" / "config.pbtxt").read_text()
    assert "KIND_CPU" in config
    assert 'key: "intra_op_thread_count" value { string_value: "1" }' in config


def test_lists_are_not_folded_however_long_the_names(models: Path, lipsync: Lipsync) -> None:
    name = "a" * 64
    shutil.copytree(models / "anna", models / name)
    manifest = models / name / "1" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"anna"', f'"{name}"').replace("audio_encoder", "e" * 64))
    rows = [re.split(r"  +", line) for line in lipsync("tenant", "list", "-r", models).out.splitlines()]
    assert len(rows) == 3
    assert (rows[1][0], rows[1][9]) == (name, "e" * 64)


def test_an_empty_repository_is_said_to_be_one(tmp_path: Path, lipsync: Lipsync) -> None:
    folder = tmp_path / "[bold] models [/x]"
    assert lipsync("tenant", "list", "-r", folder) == Done(
        0, f"no tenants in {folder}; add one with `lipsync tenant add`\n", ""
    )


def test_damaged_tenants_are_listed_with_what_is_wrong(models: Path, lipsync: Lipsync) -> None:
    (models / "anna" / "1" / MANIFEST).write_text("garbage")
    done = lipsync("tenant", "list", "-r", models)
    assert done.status == 0
    assert re.search(
        r"^anna .* damaged +- +- +- +tenant 'anna' is damaged: manifest\.json: Invalid JSON", done.out, re.MULTILINE
    )
    refused(lipsync("tenant", "show", "anna", "-r", models), "remove it and add it again")
    assert lipsync("tenant", "remove", "anna", "-r", models).status == 0
    assert tenant_names(models) == []


def test_lists_are_json_for_programs(models: Path, lipsync: Lipsync) -> None:
    listed = lipsync("tenant", "list", "-r", models, "--json", "--triton", "127.0.0.1:2")
    assert (listed.status, listed.err) == (0, f"{SILENT}\n".replace(NOWHERE, "127.0.0.1:2"))
    (anna,) = json.loads(listed.out)
    expected: dict[str, object] = {
        "tenant": "anna",
        "state": None,
        "frames": 8,
        "width": 320,
        "fps": 25,
        "fault": "",
        "copies": [],
    }
    assert anna.items() >= expected.items()
    assert anna["memory_bytes"] > 1e7


def test_lists_show_what_is_loaded(models: Path, lipsync: Lipsync, monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(repository: Path, settings: TritonSettings) -> tuple[list[Entry], dict[str, str]]:
        assert (repository, settings.endpoints) == (models, ("a:1", "b:1"))
        loaded = [Copy("a:1", "unloading", "gpu0", 7, 0.0), Copy("b:1", "ready", "gpu1", 35, time.time() - 600)]
        return [Entry("anna", copies=loaded), Entry("berta", copies=loaded[:1]), Entry("carla")], {}

    monkeypatch.setattr(tenant, "list_tenants", entries)
    listed = lipsync("tenant", "list", "-r", models, "--triton", "a:1, b:1")
    assert (listed.status, listed.err) == (0, "")
    assert [re.split(r"  +", line)[:6] for line in listed.out.splitlines()[1:]] == [
        ["anna", "ready", "a:1/gpu0,b:1/gpu1", "10 min", "42", "-"],
        ["berta", "unloading", "gpu0", "-", "7", "-"],
        ["carla", "absent", "-", "-", "-", "-"],
    ]


def test_a_bad_address_is_refused(models: Path, lipsync: Lipsync) -> None:
    refused(lipsync("tenant", "list", "-r", models, "--triton", "nowhere"), "triton.endpoints.0: String should match")


def test_verify_names_the_damaged_file(models: Path, lipsync: Lipsync) -> None:
    path = models / "anna" / "1" / "patches.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    refused(lipsync("tenant", "verify", "anna", "-r", models), "the checksum of patches.bin is wrong")


@pytest.mark.parametrize("command", ["show", "verify", "remove"])
def test_unknown_tenants_and_bad_names_are_refused(models: Path, command: str, lipsync: Lipsync) -> None:
    before = tree(models)
    refused(lipsync("tenant", command, "nobody", "-r", models), "no tenant named 'nobody' is installed")
    refused(lipsync("tenant", command, "../anna", "-r", models), r"'\.\./anna' is no tenant name: use 1 to 64")
    assert tree(models) == before


def test_rectangles_are_shown_as_they_are(models: Path, source: Path, lipsync: Lipsync) -> None:
    """Square brackets are neither markup nor a place to fold."""
    before = tree(models)
    (source / "crop_rects.json").write_text("[[1, 2, 3]]")
    refused(lipsync("tenant", "add", "berta", source, "-r", models), "1 rectangles for 8 frames in ")
    (source / "crop_rects.json").write_text("[" + "[1, 2, 3]," * 7 + "[1, 2, 3]]")
    done = lipsync("tenant", "add", "berta", source, "-r", models)
    refused(done, "")
    expected = (
        f"{source / 'crop_rects.json'}: frame 0: [1, 2, 3] is not [x1, y1, x2, y2] in whole pixels; mend the entry"
    )
    assert done.err == f"error: {expected}\n"
    (source / "crop_rects.json").write_text("{")
    refused(lipsync("tenant", "add", "berta", source, "-r", models), r"expected \[\[x1, y1, x2, y2\], \.\.\.\]$")
    assert tree(models) == before


def test_odd_characters_in_paths_do_no_harm(models: Path, tmp_path: Path, lipsync: Lipsync) -> None:
    for name in ("[red]x[/red] [/nope]", "a" * 200, "esc\x1b[31m", "ünï"):
        folder = tmp_path / name
        done = lipsync("tenant", "add", "berta", folder, "-r", models)
        refused(done, "no such directory; give")
        assert str(folder).replace("\x1b", "?") in done.err
        assert "\x1b" not in done.err


def test_a_refusal_while_progress_is_shown_is_one_line(models: Path, source: Path, lipsync: Lipsync) -> None:
    before = tree(models)
    frame = source / "frames" / "frame_7.png"
    frame.write_bytes(frame.read_bytes()[:2000])
    refused(lipsync("tenant", "add", "berta", source, "-r", models), r"frame_7\.png: truncated or damaged")
    model = negative()
    model.opset_import[0].version = 22
    (source / "checkpoint" / "model_best.onnx").write_bytes(model.SerializeToString())
    refused(lipsync("tenant", "add", "berta", source, "-r", models), "opset 22 is outside 11 to 21")
    assert tree(models) == before


def test_names_are_checked_before_anything_is_read(models: Path, lipsync: Lipsync) -> None:
    refused(lipsync("tenant", "add", "anna", "/nowhere", "-r", models), "'anna' exists already in ")
    refused(lipsync("tenant", "add", "Anna", "/nowhere", "-r", models), "'Anna' is no tenant name")
    refused(lipsync("tenant", "add", "audio_encoder", "/nowhere", "-r", models), "shared audio encoder; choose another")


def test_a_missing_encoder_names_the_command(models: Path, source: Path, lipsync: Lipsync) -> None:
    refused(
        lipsync("tenant", "add", "berta", source, "-r", models, "--encoder", "other"),
        "other/1/model.onnx: the audio encoder is not installed; run `lipsync encoder add`, or use --idle background",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["tenant", "add"],
        ["tenant", "nonsense"],
        ["tenant", "add", "berta", "--quality", "0"],
        ["tenant", "add", "berta", "--quality", "101"],
        ["tenant", "add", "berta", "--blend", "soft"],
        ["tenant", "add", "berta", "--subsampling", "4:1:1"],
        ["tenant", "add", "berta", "--max-batch-size", "51"],
        ["tenant", "add", "berta", "--fps", "x"],
        ["tenant", "show"],
        ["tenant", "list", "extra"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], lipsync: Lipsync) -> None:
    done = lipsync(*arguments)
    assert done.status == 2
    assert "Usage: " in done.err


def test_slow_stages_are_told_where_nobody_watches(
    models: Path, source: Path, lipsync: Lipsync, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SAY_EVERY_S", 0)
    done = lipsync("tenant", "add", "berta", source, "-r", models)
    assert done.status == 0
    frames = [f"frames {number}/8" for number in range(1, 9)]
    memory = [f"memory {number}/2" for number in range(3)]
    assert done.err.splitlines() == ["check 0/1", "check 1/1", *frames, "model 0/1", "model 1/1", *memory]


def test_several_faults_are_several_lines(models: Path, lipsync: Lipsync, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InvalidInput("first [1]\nsecond")

    monkeypatch.setattr(repository, "remove_tenant", fail)
    assert lipsync("tenant", "remove", "anna", "-r", models) == Done(1, "", "error: first [1]\nerror: second\n")


def test_what_the_system_refuses_is_one_line(models: Path, lipsync: Lipsync, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/models/anna")

    monkeypatch.setattr(repository, "remove_tenant", fail)
    assert lipsync("tenant", "remove", "anna", "-r", models) == Done(1, "", "error: /models/anna: Permission denied\n")


def process(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lipsync", *map(str, arguments)]


def test_as_a_process_it_keeps_streams_and_status_apart(models: Path, source: Path) -> None:
    bad = subprocess.run(process("tenant", "show", "x[y]", "-r", models), capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("error: 'x[y]' is no tenant name: ")
    assert bad.stderr.count("\n") == 1
    good = subprocess.run(process("tenant", "list", "-r", models), capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, f"{SILENT}\n")
    assert good.stdout.splitlines()[1].startswith("anna  ")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_add_leaves_no_tenant(models: Path, source: Path, number: signal.Signals, status: int) -> None:
    before = tree(models)
    code = (
        "import sys, lipsync.repository as r\n"
        "def slow(*arguments):\n"
        "    print('building', flush=True); sys.stdin.read()\n"
        "r.prepare = slow\n"
        "from lipsync.app import main; main()"
    )
    command = [sys.executable, "-c", code, "tenant", "add", "berta", str(source), "-r", str(models)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as adding:
        assert adding.stdout is not None
        assert adding.stdout.readline() == "building\n"
        adding.send_signal(number)
        _, said = adding.communicate(timeout=120)
    assert adding.returncode == status
    assert "Traceback" not in said
    assert tenant_names(models) == ["anna"]
    if number == signal.SIGINT:
        assert tree(models) == before
