"""Which backend serves a layer, and why."""
