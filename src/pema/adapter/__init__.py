"""Steps 2 and 3, on the data owner's side: the adapter, its losses, its training and its files."""
