"""The commands of the command line, a module for each group of them: options in, one call, a report out."""
