"""Small networks with named activation sites."""
