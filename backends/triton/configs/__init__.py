"""How the portable kernels are launched, as tables per vendor."""
