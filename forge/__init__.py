"""forge trains large models on machines that can vanish."""
