"""``python -m optwatch``: the same as the ``optwatch`` command."""

import sys

from optwatch.cli import main

sys.exit(main())
