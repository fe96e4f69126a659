"""Methods that ViP is compared with, one file each. A file here is found by itself; see CONTRIBUTING.md."""
