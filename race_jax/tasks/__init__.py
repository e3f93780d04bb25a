"""Tasks: what is trained, and how it is scored.

A task is one file of this folder and one line of `registry`.
"""
