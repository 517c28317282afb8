"""The wire: each .proto and what `make proto` generates from it."""
