"""A run that is killed at random and handed from one set of processes to another, and what it ends with."""
