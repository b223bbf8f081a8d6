"""Weights: the published files of a recipe, fetched into the model store and verified there without being loaded."""
