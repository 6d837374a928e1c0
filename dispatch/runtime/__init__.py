"""A layer at work: the module, its backends, its calls, and what happens when a backend fails."""
