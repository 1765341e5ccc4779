"""Starting deployments: validation, processes and their supervisor, with HTTP and without, here and on other hosts."""
