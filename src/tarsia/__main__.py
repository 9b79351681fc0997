"""``python -m tarsia`` is ``tarsia``."""

from tarsia.cli import main

raise SystemExit(main())
