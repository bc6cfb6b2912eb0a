"""The command line: what commands take (`app`, `parameters`), do (``*commands``) and print (`console`)."""

__all__: list[str] = []
