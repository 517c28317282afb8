from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from compositor.errors import InvalidInput
from lipsync import architecture

torch = pytest.importorskip("torch", reason="the training extra is not installed")

from training import weights  # noqa: E402
from training.networks import AudioEncoder, UNet  # noqa: E402


def run(graph: bytes, **inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    (output,) = onnxruntime.InferenceSession(graph, options).run(None, inputs)
    return np.asarray(output)


@pytest.mark.parametrize("width", [0.125, 0.5])
def test_the_encoder_is_the_family_s(width: float) -> None:
    graph, module = architecture.audio_encoder(width, seed=3), AudioEncoder(width).eval()
    weights.read(graph, module)
    mel = np.random.default_rng(0).uniform(-4, 4, (3, 1, 80, 16)).astype(np.float32)
    with torch.no_grad():
        ours = module(torch.from_numpy(mel)).numpy()
    theirs = run(graph.SerializeToString(), mel_spectrogram=mel)
    assert ours.shape == (3, 512)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * theirs.max())


def test_the_unet_is_the_family_s() -> None:
    graph, module = architecture.unet(0.125, seed=3), UNet(0.125).eval()
    weights.read(graph, module)
    random = np.random.default_rng(0)
    visual, audio = (random.uniform(0, 1, shape).astype(np.float32) for shape in ((2, 6, 320, 320), (2, 32, 16, 16)))
    with torch.no_grad():
        ours = module(torch.from_numpy(visual), torch.from_numpy(audio)).numpy()
    theirs = run(graph.SerializeToString(), visual=visual, audio=audio)
    assert theirs.std() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_full_width_has_the_published_size() -> None:
    assert sum(parameter.numel() for parameter in UNet().parameters()) == 12_186_935
    assert sum(parameter.numel() for parameter in AudioEncoder().parameters()) == 2_812_672


def test_weights_pass_to_the_graph_and_back() -> None:
    torch.manual_seed(1)
    module, again = AudioEncoder(0.125), AudioEncoder(0.125)
    module(torch.randn(4, 1, 80, 16))  # moves the means and variances
    graph = weights.fill(architecture.audio_encoder(0.125), module)
    weights.read(graph, again)
    for name, value in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, again.state_dict()[name])


def test_filling_keeps_the_graph_given() -> None:
    graph = architecture.audio_encoder(0.125)
    before = graph.SerializeToString()
    weights.fill(graph, AudioEncoder(0.125))
    assert graph.SerializeToString() == before


def test_another_width_is_refused() -> None:
    with pytest.raises(InvalidInput, match="same width"):
        weights.fill(architecture.audio_encoder(0.25), AudioEncoder(0.125))
    with pytest.raises(InvalidInput, match="same width"):
        weights.read(architecture.audio_encoder(0.25), AudioEncoder(0.125))


def test_another_network_is_refused() -> None:
    with pytest.raises(InvalidInput):
        weights.fill(architecture.audio_encoder(0.125), UNet(0.125))
