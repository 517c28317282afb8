from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lipsync.model_check import inspect

torch = pytest.importorskip("torch", reason="the training extra is not installed")

from training.export import export_avatar  # noqa: E402
from training.packed import PackedUNet, pack, packed_graph, unpack  # noqa: E402


def worn_in(width: float) -> PackedUNet:
    """A module whose batch normalisations do something."""
    torch.manual_seed(0)
    module = PackedUNet(width)
    with torch.no_grad():
        module.head.weight.normal_(0, 5)
        module(torch.rand(2, 6, 320, 320), torch.rand(2, 32, 16, 16))
    return module.eval()


def test_unpacking_undoes_packing() -> None:
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    assert pack(x).shape == (2, 12, 2, 3)
    assert torch.equal(unpack(pack(x)), x)


def test_an_untrained_model_shows_the_face_at_rest() -> None:
    visual = torch.rand(1, 6, 320, 320)
    with torch.no_grad():
        assert torch.equal(PackedUNet(0.125).eval()(visual, torch.rand(1, 32, 16, 16)), visual[:, :3])


def test_a_part_is_the_same_as_in_the_whole_but_near_its_border() -> None:
    """What training on parts rests on; with aligned corners, layers would see parts at another scale."""
    module = worn_in(0.125)
    visual, audio = torch.rand(1, 6, 320, 320), torch.rand(1, 32, 16, 16)
    # Nothing but the first level: deeper ones see so far that the border is everywhere.
    up = torch.nn.functional.interpolate
    whole, part = (
        up(module.encoder[0](pack(x)), scale_factor=2, mode="bilinear") for x in (visual, visual[..., 64:256])
    )
    assert torch.allclose(whole[..., 84:236], part[..., 20:172], atol=1e-5)
    rows, columns = slice(0, 320), slice(64, 256)
    with torch.no_grad():
        assert module.predict(visual[..., columns], audio, (rows, columns)).shape == (1, 3, 320, 192)


def test_what_is_shown_is_not_predicted() -> None:
    visual = torch.rand(1, 6, 320, 320)
    with torch.no_grad():
        output = worn_in(0.125).predict(visual, torch.rand(1, 32, 16, 16))
    changed = (output != visual[:, :3]).any(1)[0]
    assert changed[5:310, 5:315].float().mean() > 0.9
    changed[5:310, 5:315] = False
    assert not changed.any()


def test_the_graph_is_the_module() -> None:
    module = worn_in(0.125)
    random = np.random.default_rng(1)
    visual, audio = (random.uniform(0, 1, shape).astype(np.float32) for shape in ((2, 6, 320, 320), (2, 32, 16, 16)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(packed_graph(module).SerializeToString(), options)
    (theirs,) = session.run(None, {"visual": visual, "audio": audio})
    with torch.no_grad():
        ours = module(torch.from_numpy(visual), torch.from_numpy(audio)).numpy()
    assert ours.shape == (2, 3, 320, 320)
    assert np.abs(ours - visual[:, :3]).mean() > 0.01
    assert ours.min() == 0
    assert ours.max() == 1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_exported_avatar_is_one_that_lipsync_takes(tmp_path: Path) -> None:
    assert export_avatar(worn_in(0.125), tmp_path / "model.onnx") < 1e-4
    model = inspect(tmp_path / "model.onnx")
    assert (model.visual, model.audio, model.output) == ("visual", "audio", "output")
    assert (model.opset, model.batch) == (17, "dynamic")
