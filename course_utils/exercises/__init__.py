"""The exercises' checks, a module a lesson."""
