"""Measured selection: tables of times, what is chosen by them, where they are, how to make one."""
