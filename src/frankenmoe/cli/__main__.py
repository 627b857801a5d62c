"""`python -m frankenmoe.cli`, the same as `frankenmoe`."""

from frankenmoe.cli.app import main

main()
