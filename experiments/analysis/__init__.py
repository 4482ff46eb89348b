"""What comes after a run: rows of many seeds, intervals, figures, episodes."""
