"""Training that all recipes share.

Settings, data, loop, resuming, losses over pairs, optimizer, log.
"""
