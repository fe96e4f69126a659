"""The verbs of the `vipbench` command, one file for each group; a verb reads its options and calls a package."""
