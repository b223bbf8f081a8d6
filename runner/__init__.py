"""Video Lab runner: a manifest of jobs in, rendered character animation and its records out."""

__version__ = "0.1.0"
