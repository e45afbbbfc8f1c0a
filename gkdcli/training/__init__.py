"""One loop for both stages of both phases."""
