"""Quantization: number formats, layers, kernels and files of FP4 and INT4 weights. Never: jobs."""
