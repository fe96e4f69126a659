"""Statistics of predictions: intervals, comparisons, ranks, warnings, selective prediction, conformal sets, subgroups.

Pure functions of `vipbench.harness.evaluation.metrics.Predicted`; docs/statistics.md lists the method of each number.
"""
