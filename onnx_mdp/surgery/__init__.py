"""From a plan to a slimmer model, and the law that it equals the masked original."""

__all__: list[str] = []
