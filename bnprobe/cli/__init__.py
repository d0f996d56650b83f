"""The command line: parse, call the pipeline, write, exit. Nothing here imports torch before a command runs."""
