"""What `scripts/reproduce.py` does, in the order in which it does it.

miniature  small generated data sets in the place of the real ones, for the budget "tiny"
plan       the runs of a table: for each one its configuration, its command and its folder
work       runs them as processes, a few at a time, and stops them
results    what was measured: JSON, and a Markdown table with means and deviations
figure     the same as an SVG file
"""
