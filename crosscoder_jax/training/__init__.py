"""From stored activations to a crosscoder: the recipe, the step, the loop and its checkpoints."""
