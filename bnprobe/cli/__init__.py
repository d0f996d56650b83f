"""The command line: parse, call the pipeline, write, exit. torch is not imported before a command runs."""
