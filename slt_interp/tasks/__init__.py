"""Data and causal models of the tasks that networks are trained on."""
