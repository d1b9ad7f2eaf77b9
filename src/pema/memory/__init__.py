"""The external memory: (f(c_i), y_i) pairs on the data owner's disk, in safetensors shards with one manifest."""
