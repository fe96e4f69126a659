"""Methods: how a frozen model is adapted to a task."""
