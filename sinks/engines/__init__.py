"""The engines, one a module; each imports its library when it is imported, so that a role installs only its own."""
