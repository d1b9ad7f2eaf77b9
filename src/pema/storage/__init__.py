"""Object storage: memories, adapters and head bundles behind addresses of fsspec (`s3://`, `gs://`, `hf://`, ...)."""
