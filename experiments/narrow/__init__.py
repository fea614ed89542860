"""Which method finds a narrow change: a few rare features, beside much that only drifts."""
