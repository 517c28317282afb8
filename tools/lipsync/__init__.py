"""The `lipsync` command: prepares tenants, runs the embedded Triton, speaks, demonstrates."""
