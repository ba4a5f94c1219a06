"""The command line: how programs start and end, their options, and what they print."""
