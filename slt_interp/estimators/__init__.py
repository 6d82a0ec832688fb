"""From draws to numbers with errors and verdicts."""
