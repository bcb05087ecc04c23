"""What make_golden.py is made of: one module a folder of tests/data."""
