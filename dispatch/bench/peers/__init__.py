"""Other libraries, called as their users call them, to be measured in the same run."""
