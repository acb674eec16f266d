"""What to try next: rank spaces, budgets, priors, surrogate, sampler and study. Knows neither HTTP nor transformers."""
