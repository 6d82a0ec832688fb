"""From run directories to HTML."""
