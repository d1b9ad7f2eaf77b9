"""The PLM owner's server: the contract of `owner` over HTTP, for the keys of a policy."""
