"""Step 4: mix the PLM's and the adapter's distributions per token, through the model's own `generate`."""
