"""The models of one Triton: which are loaded, who is unloaded for whom. `residency` is the door to all of it."""
