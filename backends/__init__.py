"""Backends, one module each; the registry names them."""
