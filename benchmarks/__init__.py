"""What `benchmark.py` is made of: measure.py times, subject.py is what is timed, peer.py is transformers on
the same weights, waterfall.py puts back what the levers removed, tables.py is for people."""
