"""The probe, its fit, tokenization, and one executor per kind of task."""
