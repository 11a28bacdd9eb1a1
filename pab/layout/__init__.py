"""Explain any file or folder and name the next command."""
