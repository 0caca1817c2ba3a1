"""Training for clipkit: one loop, one small Step per method, recipes as YAML."""
