"""One file per command: arguments in, one call, text out."""
