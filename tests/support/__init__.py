"""What the tests hold the package against, and ways to watch, stop and start it."""
