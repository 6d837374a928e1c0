"""The table of decisions that selection is compared with."""
