"""The commands of the command line: parse options, call one function, print the result."""
