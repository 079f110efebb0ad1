"""Training in several processes, on gloo."""
