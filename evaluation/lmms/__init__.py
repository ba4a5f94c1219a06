"""Official benchmarks through lmms-eval: the adapter, tasks, fake data, the paper's tables."""
