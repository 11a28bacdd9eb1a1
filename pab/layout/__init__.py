"""Describe any file or folder, and suggest the next command."""
