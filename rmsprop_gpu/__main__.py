"""``python -m rmsprop_gpu``."""

from .cli import main

raise SystemExit(main())
