"""Accuracy on test sets: what is asked, how answers are scored, stored, tabled, plotted and compared."""
