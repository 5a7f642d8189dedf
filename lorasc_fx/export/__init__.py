"""Out: a cascade in other people's formats."""

__all__: list[str] = []
