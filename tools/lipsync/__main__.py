"""`python -m lipsync` is the `lipsync` command."""

from .app import main

main()
