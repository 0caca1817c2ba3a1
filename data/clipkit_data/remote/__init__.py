"""Files elsewhere: opening what fsspec opens, trying again, and copies on this machine."""
