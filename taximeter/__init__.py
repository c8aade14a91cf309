"""Taximeter: the command line, the configuration and the composition root. It alone may import every other package."""
