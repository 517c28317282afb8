"""All Tritons as one: `fleet` is the door; `connection`, `control` and `inference` alone know tritonclient."""
