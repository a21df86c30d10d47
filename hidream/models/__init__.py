"""The networks: each package has its config, tokens, model and weights."""
