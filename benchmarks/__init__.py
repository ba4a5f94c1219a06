"""What `benchmark.py` is made of: measure.py times; subject.py is what is timed, and peer.py is transformers
on the same weights; parts.py, methods.py and waterfall.py measure; tables.py and plot.py are for people."""
