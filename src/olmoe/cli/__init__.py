"""The command line: `olmoe <command>`, one module a command, heavy imports inside `run`."""
