"""The compositor: speech in, composited video frames out, with Triton doing the inference."""

__version__ = "0.1.0"
