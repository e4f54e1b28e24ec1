"""`python -m kdfast`, the same as the command `kdfast`."""

from kdfast.cli.main import main

main()
