"""The parts of ``benchmark_quality.py``: tasks, contestants, one training function for all, statistics, reports."""
