"""Videos -> store -> clips."""
