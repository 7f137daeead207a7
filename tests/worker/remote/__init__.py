"""The worker seen and steered from outside."""
