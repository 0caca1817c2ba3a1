"""clipkit_data: shards in, batches out; also pictures into shards, and shards into embeddings.

Nothing is imported here, so that the command line can name its commands without loading torch.
"""
