"""The client: a PLM on its owner's server, behind the contract."""
