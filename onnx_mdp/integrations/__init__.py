"""Pruning as a step of other tools' pipelines; each module here is loaded by its tool."""
