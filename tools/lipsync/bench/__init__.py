"""Measures the project: each part returns plain figures and targets, which one report collects."""
