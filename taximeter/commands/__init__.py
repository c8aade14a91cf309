"""The commands, by what they are for. `taximeter.cli` puts them together."""
