"""What users read: tables, pictures and JSON."""

__all__: list[str] = []
