"""``python -m bnprobe``."""

from bnprobe.cli.app import main

if __name__ == "__main__":
    main()
