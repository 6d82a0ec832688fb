"""Ways to damage a network by degrees, and comparing them at equal damage."""
