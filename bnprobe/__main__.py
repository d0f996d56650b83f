"""``python -m bnprobe``, and the ``bnprobe`` command: Ctrl-C may meet the imports, too."""

from bnprobe.cli.processes import collect_garbage, collect_no_garbage, leave_when_interrupted


def main() -> None:
    """Run the command line."""
    leave_when_interrupted()
    collect_no_garbage()
    try:
        from bnprobe.cli.app import main as run

        run()
    finally:
        collect_garbage()


if __name__ == "__main__":
    main()
