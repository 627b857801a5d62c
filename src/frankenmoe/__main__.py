"""`python -m frankenmoe`, the same as `frankenmoe`."""

from frankenmoe.cli import main

main()
