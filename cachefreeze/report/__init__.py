"""Results of runs: files, lines on the terminal, the page of a run, and comparisons of runs."""
