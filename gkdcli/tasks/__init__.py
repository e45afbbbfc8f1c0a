"""Recognition (and detection, to come): the same few functions each."""
