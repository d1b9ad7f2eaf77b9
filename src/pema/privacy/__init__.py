"""Privacy as an attacker measures it: membership inference against an adapter."""
