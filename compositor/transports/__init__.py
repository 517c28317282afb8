"""Transports: each converts a request, calls the compositor, and converts the answer back."""
