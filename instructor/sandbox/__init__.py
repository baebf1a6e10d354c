"""Where students' code runs: a fork server in a cage, its children, and talking to them.

This file is loaded in every child and stays empty.
"""
