"""The command line: `olmoe <command>`, one module per command, heavy imports inside `run`."""
