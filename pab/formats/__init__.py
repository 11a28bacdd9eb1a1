"""Scores and ranked lists in the forms of other tools, read and written."""
