"""Training code shared by all recipes.

Settings, data, loop, resuming, pair losses, optimizer, log.
"""
