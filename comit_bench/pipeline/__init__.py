"""From names to records: settings, jobs, plan, evaluation, tokenization, sweeps."""
