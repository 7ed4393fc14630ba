"""Reports of runs: what a run has left, the analysis of its predictions and texts, figures, pages in HTML and Markdown."""
