"""How fast a step is, compared with what people use today: ``python -m benchmarks`` (see README.md)."""
