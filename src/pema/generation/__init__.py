"""Step 4: the mixture of the PLM and the adapter, token by token, through the model's own `generate`."""
