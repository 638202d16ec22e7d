"""One module per kind of task, what they share, and what they hand back."""
