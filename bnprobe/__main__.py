"""``python -m bnprobe``, and the ``bnprobe`` command: Ctrl-C may meet the imports, too."""

from bnprobe.cli.processes import leave_when_interrupted


def main() -> None:
    """Run the command line."""
    leave_when_interrupted()
    from bnprobe.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
