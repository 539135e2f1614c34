"""Floor 6: arguments, help, exit codes and tables."""
