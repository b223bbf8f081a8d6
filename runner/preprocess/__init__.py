"""Preprocessing: make skeletons and faces from a driving video, and an upright RGB image from a reference.

`prepare` calls the steps; every other file is one step. Never: manifests, jobs, torch.
"""
