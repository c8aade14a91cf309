"""`taximeter demo`: the whole path on this machine, shown answer by answer."""
