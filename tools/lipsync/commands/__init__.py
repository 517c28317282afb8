"""The subcommands of `lipsync`: each reads its options, calls the library, and writes for people."""
