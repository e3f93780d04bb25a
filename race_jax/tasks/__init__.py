"""Tasks: what is trained and how it is scored. Each is one file, and one line of `registry`."""
