"""How fast a step is, against what people use today: ``python -m benchmarks`` (see README.md)."""
