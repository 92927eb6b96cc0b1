"""`python -m stratoscope` is `stratoscope`, where the command is not on the path."""

from stratoscope.cli import main

main()
