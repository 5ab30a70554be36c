"""`python -m orchestrator`: the command line where no script is installed, as in a job."""

from orchestrator.cli import main

main()
