"""Inputs: images, their targets, and archives of both."""

__all__: list[str] = []
