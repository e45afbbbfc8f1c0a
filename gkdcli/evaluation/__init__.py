"""Model x store -> predictions -> scores."""
