"""`python -m slt_interp` is `slt-interp`."""

from slt_interp.cli import main

main()
