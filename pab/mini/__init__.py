"""A small PAB-shaped set of drawn people: every file of the real layout, made from a seed."""
