"""Readers and writers for scores and ranked lists in other tools' formats."""
