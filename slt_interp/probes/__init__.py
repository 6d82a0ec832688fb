"""Interpretability probes: functions of weights that run over posterior draws."""
