"""The command line: arguments, help, exit codes and tables."""
