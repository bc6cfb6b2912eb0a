"""The problem that is solved, its solution as a plan, and the loop that meets the target."""

__all__: list[str] = []
