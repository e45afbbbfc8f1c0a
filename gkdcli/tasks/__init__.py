"""Recognition and detection: the same few functions each."""
