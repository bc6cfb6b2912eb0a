"""From measurements to a table of the latency of every choice."""

__all__: list[str] = []
