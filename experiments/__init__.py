"""Experiments that show what the package does: everything may be imported here, nothing imports it."""
