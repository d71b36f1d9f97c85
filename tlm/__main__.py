"""`python -m tlm`, which launchers of several processes call."""

import sys

from tlm.cli import main

sys.exit(main())
