"""Live sessions: what is told, what waits for the viewer, and what each frame period shows."""
