"""`python -m jobs.cli …`: the command where its script is not installed."""

from jobs.cli.app import main

main()
