"""The PLM owner's server: the contract of `owner`, spoken over HTTP to whom a policy lets in."""
