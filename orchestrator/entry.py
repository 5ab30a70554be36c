"""The entry point `orchestrate`: Ctrl-C while the command line is still imported ends the process without a traceback.

What signals do after that is said in `runners.signals`. Python's own start, before this module, cannot be helped.
"""

import signal


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from orchestrator import cli

    cli.main()
