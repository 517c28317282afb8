"""Trains the demo's audio encoder and avatar on speech and pictures that it makes itself. Never part of what serves."""
