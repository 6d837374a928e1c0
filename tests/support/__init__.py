"""What tests share: cases, oracles, and stand-ins for libraries that are not installed."""
