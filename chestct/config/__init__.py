"""Settings: their schema, their checks, and how Hydra's files and overrides become a `Config`."""
