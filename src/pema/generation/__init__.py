"""Step 4: the mixture of the PLM's and the adapter's distributions per token, in the model's own `generate`."""
