"""Every lesson in real JupyterLab, in a real browser: `make test-browser`, not `make test`."""
