"""Shards as files: what a tar holds, where, and what is wrong with it; indexes, manifests, writing."""
