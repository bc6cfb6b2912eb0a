"""What each unit is worth."""

__all__: list[str] = []
