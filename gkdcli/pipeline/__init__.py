"""The commands' work, one module each: Settings -> Result. The one place that joins rooms."""
