"""Taximeter: the command line, the configuration and the composition root. The one package that may import every other."""
