"""An interpreter of Gluon kernels for NVIDIA's Hopper, on the CPU."""
