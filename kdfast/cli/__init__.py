"""The command `kdfast`, and nothing that Python code needs. May import: everything."""
