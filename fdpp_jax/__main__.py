"""`python -m fdpp_jax` is the `fdpp-jax` command."""

import sys

from fdpp_jax.cli import main

sys.exit(main())
