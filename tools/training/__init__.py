"""Trains the demo's audio encoder and avatar on speech and pictures that it makes itself. Never part of what serves."""

import lipsync as lipsync  # Before ONNX Runtime, whose telemetry it turns off.
