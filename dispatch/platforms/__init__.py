"""What a device is, which devices are known, and what this machine has."""
