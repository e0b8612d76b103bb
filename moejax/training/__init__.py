"""Training: state and optimiser, objectives, the loop."""
