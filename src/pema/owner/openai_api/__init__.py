"""A PLM behind an API that gives the likeliest tokens only, beside a small open PLM: the proxy."""
