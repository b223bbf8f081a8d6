"""Preprocessing: a driving video becomes skeletons and faces, a reference becomes an upright RGB image.

`pipeline` strings the steps together; every other file is one step. Knows frames, never manifests, jobs or torch.
"""
