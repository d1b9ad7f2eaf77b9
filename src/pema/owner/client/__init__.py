"""A PLM behind its owner's server, behind the contract."""
