"""Figures of runs, one file per kind: `vipbench plot KIND DIR`.

rows of runs  ->  a query  ->  groups of runs that differ in their seeds  ->  a chart with its n  ->  SVG or PNG
"""
