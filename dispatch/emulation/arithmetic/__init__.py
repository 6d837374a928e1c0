"""Pure functions on arrays: bits, floats, 8-bit floats, lanes and matrix instructions."""
