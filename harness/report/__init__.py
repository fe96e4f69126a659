"""Reports: from run directories to tables."""
