"""Making, looking at, copying and filtering shards: what the commands of `clipkit shards` do."""
