"""Models that are not in float32: halves, integers, float64."""

__all__: list[str] = []
