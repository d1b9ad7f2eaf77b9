"""Privacy audit: membership inference attacks against an adapter."""
