"""The `lipsync` command: prepares tenants, runs the embedded Triton, speaks, demonstrates."""

import os

# From release 1.29 on ONNX Runtime reports models and machine to its maker, unless this is set when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
