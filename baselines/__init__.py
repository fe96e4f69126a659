"""Methods that ViP is compared with, one file each. Every file here is imported; see CONTRIBUTING.md."""
