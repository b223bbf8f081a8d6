"""Golden files: help texts, fingerprints of the manifests, the demo's frames. `collect` writes them."""
