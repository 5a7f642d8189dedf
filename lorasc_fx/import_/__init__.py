"""In: other people's adapters as the first experts of a cascade."""

__all__: list[str] = []
