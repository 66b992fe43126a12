"""`python -m steerguard.cli` is `steerguard`."""

from steerguard.cli import main

main()
