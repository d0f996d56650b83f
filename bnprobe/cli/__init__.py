"""The command line: parse, call a command, write, exit. torch is not imported before a command runs."""
